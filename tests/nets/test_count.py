"""Parameters and multiply-adds against published counts, a plain formula and sums worked out by hand."""

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnlab.errors import UsageError
from bnlab.nets import build
from bnlab.nets.count import LARGEST, LayerCount, count
from bnlab.nets.network import TableNetwork
from bnlab.nets.registry import NETWORKS, has_row
from bnlab.nets.tables import Auxiliary

EVERY_TABLE = [
    (name, variant, stem)
    for name, network in NETWORKS.items()
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
def test_each_weight_is_multiplied_once_for_each_output_pixel(name: str, variant: str, stem: str | None) -> None:
    heads = has_row(name, Auxiliary)
    network = weightless(name, classes=7, variant=variant, stem=stem, auxiliary=heads)
    layers = count(network, 64)
    weighted = 0
    for part in (part for layer in layers for part in layer.parts):
        module = network.get_submodule(part.name)
        if isinstance(module, nn.Conv2d | nn.Linear):
            weighted += 1
            assert part.multiply_adds == module.weight.numel() * prod(part.output[1:]) > 0
        else:
            assert part.multiply_adds == 0
    assert weighted == sum(isinstance(module, nn.Conv2d | nn.Linear) for module in network.modules()) >= 4
    assert all(layer.multiply_adds == sum(part.multiply_adds for part in layer.parts) for layer in layers)
    assert [layer.name for layer in layers if layer.kind == "auxiliary head"] == ["aux1", "aux2"] * heads


def test_multiply_adds_are_the_published_ones() -> None:
    """1.498 billion in torchvision's table of its classification weights (GIPS of `GoogLeNet_Weights`)."""
    layers = count(weightless("bn_googlenet", classes=1000, variant="torchvision"), 224)
    assert round(sum(layer.multiply_adds for layer in layers) / 1e9, 3) == 1.498


def test_multiply_adds_worked_out_by_hand() -> None:
    layers = by_name(count(weightless("bn_googlenet", classes=1000, auxiliary=True), 224))
    assert layers["conv1"].multiply_adds == 64 * 112 * 112 * 3 * 7 * 7 == 118_013_952
    assert layers["pool1"].multiply_adds == 0
    assert layers["fc"].multiply_adds == 1024 * 1000
    assert layers["aux1"].multiply_adds == 128 * 4 * 4 * 512 + 2048 * 1024 + 1024 * 1000


def test_a_filter_of_a_grouped_convolution_has_the_channels_of_its_group() -> None:
    layers = by_name(count(weightless("bn_inception", classes=10, stem="separable"), 224))
    depthwise, pointwise, bn = layers["conv1"].parts
    assert depthwise.name == "conv1.conv.0"
    assert depthwise.kind == "7x7 convolution, stride 2, 3 groups"
    assert depthwise.multiply_adds == 24 * 112 * 112 * 1 * 7 * 7
    assert pointwise.multiply_adds == 64 * 112 * 112 * 24
    assert (bn.name, bn.kind, bn.parameters, bn.multiply_adds) == ("conv1.bn", "BatchNorm2d", 128, 0)
    assert layers["conv1"].kind == "separable 7x7 convolution, stride 2"


class UsersOwn(nn.Module):
    """A normalisation that reads values, which meta tensors do not have, and that contains a convolution."""

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
        UsersOwn,
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
def test_counting_does_not_change_the_network(training: bool) -> None:
    network = build("bn_small_inception", classes=3, dropout=0.5).train(training)
    network.conv1.eval()
    calls: list[object] = []
    network.conv1.register_forward_hook(lambda *_: calls.append("after"))
    network.conv1.register_forward_pre_hook(lambda *_: calls.append("before"))
    before = {name: (id(tensor), tensor.clone()) for name, tensor in network.state_dict(keep_vars=True).items()}
    modes = [module.training for module in network.modules()]
    modules = [id(module) for module in network.modules()]
    generator = torch.get_rng_state()
    count(network, 32)
    assert torch.equal(torch.get_rng_state(), generator)
    assert calls == []  # hooks get real images only
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
def test_output_shapes_are_those_of_a_real_image(name: str, known: dict[str, tuple[int, ...]]) -> None:
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


def test_kinds_of_layers() -> None:
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
def test_a_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match=rf"size {size} .*: .*1 to {LARGEST}"):
        count(weightless("mlp", classes=2), size)
