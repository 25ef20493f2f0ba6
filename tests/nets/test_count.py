"""Parameters and multiply-adds against published counts, torch's own counter and sums worked out by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bnlab.errors import UsageError
from bnlab.nets import build
from bnlab.nets.count import LARGEST, LayerCount, count
from bnlab.nets.network import TableNetwork
from bnlab.nets.registry import CATALOGUE, has_row
from bnlab.nets.tables import Auxiliary

EVERY_TABLE = [
    (name, variant, stem)
    for name, network in CATALOGUE.items()
    for variant in network.variants
    for stem in (None, *network.stems)
]


def weightless(name: str, *, classes: int, **options: Any) -> TableNetwork:
    with torch.device("meta"):
        return build(name, classes=classes, **options)


def parameters(layers: list[LayerCount]) -> int:
    return sum(layer.parameters for layer in layers)


def by_name(layers: list[LayerCount]) -> dict[str, LayerCount]:
    return {layer.name: layer for layer in layers}


@pytest.mark.parametrize(
    ("name", "options", "published"),
    [
        ("bn_inception", {"classes": 1000, "variant": "literal"}, 11_285_224),
        ("bn_inception", {"classes": 1000, "variant": "corrected"}, 11_194_984),
        ("bn_inception", {"classes": 1000, "variant": "literal", "stem": "separable"}, 11_278_528),
        ("bn_googlenet", {"classes": 5, "conv_bias": True}, 6_280_421),
        ("bn_googlenet", {"classes": 5, "conv_bias": True, "auxiliary": True}, 10_620_911),
        ("bn_googlenet", {"classes": 1000, "variant": "torchvision"}, 6_624_904),
        ("bn_googlenet", {"classes": 1000, "variant": "torchvision", "auxiliary": True}, 13_004_888),
    ],
)
def test_parameters_are_the_published_ones(name: str, options: dict[str, Any], published: int) -> None:
    assert parameters(count(weightless(name, **options), 64)) == published


@pytest.mark.parametrize(("name", "variant", "stem"), EVERY_TABLE)
def test_multiply_adds_are_half_of_what_torch_counts(name: str, variant: str, stem: str | None) -> None:
    """torch counts what runs: in evaluation the backbone, and the heads by themselves on maps of the size they get."""
    heads = has_row(name, Auxiliary)
    network = weightless(name, classes=7, variant=variant, stem=stem, auxiliary=heads).eval()
    layers = count(network, 64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 64, 64, device="meta"))
        for row, head in network.heads.items():
            network.get_submodule(head)(torch.zeros(1, *by_name(layers)[row].output, device="meta"))
    aten = torch.ops.aten
    kinds = (aten.convolution, aten.addmm, aten.mm)  # and no bmm, by which Pixels takes its averages
    expected = sum(counter.get_flop_counts()["Global"].get(kind, 0) for kind in kinds)
    assert expected > 0
    assert 2 * sum(layer.multiply_adds for layer in layers) == expected
    assert [layer.name for layer in layers if layer.kind == "auxiliary head"] == ["aux1", "aux2"] * heads


def test_multiply_adds_worked_out_by_hand() -> None:
    layers = by_name(count(weightless("bn_googlenet", classes=1000, auxiliary=True), 224))
    assert layers["conv1"].multiply_adds == 64 * 112 * 112 * 3 * 7 * 7 == 118_013_952
    assert layers["pool1"].multiply_adds == 0
    assert layers["fc"].multiply_adds == 1024 * 1000
    assert layers["aux1"].multiply_adds == 128 * 4 * 4 * 512 + 2048 * 1024 + 1024 * 1000


def test_a_grouped_convolution_counts_its_own_channels_alone() -> None:
    layers = by_name(count(weightless("bn_inception", classes=10, stem="separable"), 224))
    depthwise, pointwise, bn = layers["conv1"].parts
    assert depthwise.name == "conv1.conv.0"
    assert depthwise.kind == "7x7 convolution, stride 2, 3 groups"
    assert depthwise.multiply_adds == 24 * 112 * 112 * 1 * 7 * 7
    assert pointwise.multiply_adds == 64 * 112 * 112 * 24
    assert (bn.name, bn.kind, bn.parameters, bn.multiply_adds) == ("conv1.bn", "BatchNorm2d", 128, 0)
    assert layers["conv1"].kind == "separable 7x7 convolution, stride 2"


class OfOnesOwn(nn.Module):
    """Looks at values, which a tensor without any does not allow, and is made of layers that are none of the net's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x) if float(x.mean()) > 0 else x


@pytest.mark.parametrize(
    "norm",
    [
        "none",
        "batch",
        "sync",
        "ghost:4",
        "whitening:4",
        lambda channels: nn.GroupNorm(1, channels),
        lambda channels: nn.BatchNorm2d(channels, affine=False),
        OfOnesOwn,
    ],
)
def test_every_parameter_is_counted_once(norm: str | Callable[[int], nn.Module]) -> None:
    network = build("bn_small_inception", classes=5, norm=norm)
    layers = count(network, 32)
    expected = sum(p.numel() for p in network.parameters())
    parts = [part for layer in layers for part in layer.parts]
    assert parameters(layers) == expected
    assert sum(part.parameters for part in parts) == expected
    assert sum(part.name.endswith(".bn") for part in parts) == (0 if norm == "none" else 43)
    assert sum(layer.multiply_adds for layer in layers) == sum(part.multiply_adds for part in parts) > 0


def test_each_part_is_named_as_its_weights_are() -> None:
    network = weightless("bn_googlenet", classes=5, auxiliary=True)
    parts = {part.name for layer in count(network, 64) for part in layer.parts}
    assert parts == {name.rpartition(".")[0] for name in network.state_dict()}


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_left_as_it_was(training: bool) -> None:
    network = build("bn_small_inception", classes=3).train(training)
    network.conv1.eval()
    calls: list[object] = []
    network.conv1.register_forward_hook(lambda *_: calls.append("after"))
    network.conv1.register_forward_pre_hook(lambda *_: calls.append("before"))
    before = {name: (id(tensor), tensor.clone()) for name, tensor in network.state_dict(keep_vars=True).items()}
    modes = [module.training for module in network.modules()]
    modules = [id(module) for module in network.modules()]
    count(network, 32)
    assert calls == []  # a hook hears of true images alone
    assert [module.training for module in network.modules()] == modes
    assert [id(module) for module in network.modules()] == modules
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()]
    assert sum(hooks) == 2
    after = network.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, (identity, tensor) in before.items():
        assert id(after[name]) == identity
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0)
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, 32, 32))
    assert calls == ["before", "after"]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("bn_googlenet", {"conv1": (64, 112, 112), "inception3b": (480, 28, 28), "pool4": (832, 7, 7), "fc": (10,)}),
        ("bn_inception", {"inception3c": (576, 14, 14), "inception4c": (608, 14, 14), "inception4e": (1056, 7, 7)}),
    ],
)
def test_outputs_are_those_of_a_true_image(name: str, known: dict[str, tuple[int, ...]]) -> None:
    network = build(name, classes=10, auxiliary=True)
    layers = count(network, 224)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        module = network.get_submodule(layer.name)
        module.register_forward_hook(lambda _, __, y, name=layer.name: shapes.update({name: tuple(y.shape[1:])}))
    with torch.no_grad():
        network(torch.zeros(1, 3, 224, 224))  # in training, in which the heads run too
    assert list(shapes) == [layer.name for layer in layers]
    assert shapes == {layer.name: layer.output for layer in layers}
    assert known.items() <= shapes.items()
    assert shapes["aux1"] == (10,)


def test_half_precision_and_other_channels() -> None:
    network = build("small_inception", classes=3, in_channels=1).half()
    assert by_name(count(network, 32))["conv1"].multiply_adds == 32 * 32 * 32 * 9


def test_a_layer_says_what_it_is() -> None:
    network = weightless("bn_inception", classes=2, local_response=True)
    kinds = {layer.name: layer.kind for layer in count(network, 64)}
    expected = {
        "conv1": "7x7 convolution, stride 2",
        "pool1": "3x3 max pooling, stride 2",
        "lrn1": "local response normalisation",
        "conv3": "3x3 convolution",
        "inception3a": "inception",
        "inception3c": "inception, stride 2",
        "pool": "mean of each map",
        "fc": "linear",
    }
    assert expected.items() <= kinds.items()
    kinds = {layer.name: layer.kind for layer in count(weightless("bn_mlp", classes=2), 64)}
    assert list(kinds.values()) == ["28x28 pixels as a vector", "linear", "linear", "linear", "linear"]


@pytest.mark.parametrize("size", [0, -3, LARGEST + 1])
def test_a_size_that_cannot_be(size: int) -> None:
    with pytest.raises(UsageError, match=rf"^size {size} cannot be: give a whole number of pixels, 1 to 65536$"):
        count(weightless("mlp", classes=2), size)
