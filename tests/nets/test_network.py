import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bnlab.errors import UsageError
from bnlab.nets import NETWORKS, build
from bnlab.nets.build import move_network
from bnlab.nets.network import TableNetwork
from bnlab.nets.registry import has_row
from bnlab.nets.tables import Auxiliary
from bnlab.norm import fold, reference
from bnlab.norm.layers import BatchNorm

SIZES = (32, 64, 96, 128, 224, 299)
# Every network, variant and stem, and every other option once.
KINDS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"variant": variant}) for name in NETWORKS for variant in NETWORKS[name].variants),
    *((name, {"stem": stem}) for name in ("bn_inception", "googlenet") for stem in NETWORKS[name].stems),
    ("inception", {"local_response": True}),
    ("bn_small_inception", {"placement": "after"}),
    ("bn_small_inception", {"conv_bias": True}),
    ("bn_small_inception", {"activation": "sigmoid"}),
    *(("bn_small_inception", {"norm": norm}) for norm in ("sync", "ghost:2", "whitening:4")),
]
IDS = [f"{name} {options}" for name, options in KINDS]


def tuple_of(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.parametrize(("name", "options"), KINDS, ids=IDS)
def test_every_parameter_learns_at_every_size(name: str, options: dict[str, Any]) -> None:
    """Narrow networks, and images that are not square, since shapes are what can fail."""
    torch.manual_seed(0)
    heads = has_row(name, Auxiliary)
    for size in (32, 97):
        network = build(name, classes=3, auxiliary=heads, width=0.25, **options)
        outputs = tuple_of(network(torch.randn(4, 3, size, size + 5)))
        assert [tuple(o.shape) for o in outputs] == [(4, 3)] * (3 if heads else 1)
        loss = sum(F.cross_entropy(o, torch.tensor([0, 2, 1, 1])) for o in outputs)
        assert isinstance(loss, Tensor)
        loss.backward()  # type: ignore[no-untyped-call]
        assert not [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
        torch.optim.SGD(network.parameters(), lr=0.01).step()
        answer = network.eval()(torch.randn(1, 3, size, size))
        assert answer.shape == (1, 3)
        assert answer.isfinite().all()


@pytest.mark.parametrize("name", NETWORKS)
def test_large_images(name: str) -> None:
    network = build(name, classes=3, auxiliary=has_row(name, Auxiliary), width=0.25)
    for size in (64, 128, 224, 299):
        with torch.no_grad():
            outputs = tuple_of(network.train()(torch.randn(2, 3, size, size)))
            assert [tuple(o.shape) for o in outputs] == [(2, 3)] * len(outputs)
            assert network.eval()(torch.randn(1, 3, size, size)).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_size_at_full_width(name: str, size: int) -> None:
    network = build(name, classes=3, auxiliary=has_row(name, Auxiliary))
    torch.stack(tuple_of(network(torch.randn(2, 3, size, size)))).sum().backward()  # type: ignore[no-untyped-call]
    assert not [n for n, p in network.named_parameters() if p.grad is None]
    assert network.eval()(torch.randn(1, 3, size, size)).isfinite().all()


class Slow(nn.Module):
    """A normalisation layer's statistics and parameters, applied by the reference."""

    def __init__(self, layer: BatchNorm) -> None:
        super().__init__()
        self.layer = layer
        self.mean, self.var = layer.running_mean.clone(), layer.running_var.clone()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        gamma, beta, eps = self.layer.weight, self.layer.bias, self.layer.eps
        if not self.training:
            return reference.inference(x, gamma, beta, self.mean, self.var, eps)
        return reference.transform(x, gamma, beta, eps).y


def network_and_reference(name: str, **options: Any) -> tuple[TableNetwork, TableNetwork]:
    """The network in float64 with its own statistics, and a copy whose normalisation is the reference's."""
    torch.manual_seed(1)
    network = build(name, classes=3, **options).double()
    for layer in network.modules():
        if isinstance(layer, BatchNorm):
            for tensor in (layer.weight, layer.running_var):
                nn.init.uniform_(tensor, 0.5, 2)  # type: ignore[arg-type]
            for tensor in (layer.bias, layer.running_mean):
                nn.init.normal_(tensor)  # type: ignore[arg-type]
    reference_network = build(name, classes=3, **options).double()
    reference_network.load_state_dict(network.state_dict())
    for module in list(reference_network.modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, BatchNorm):
                setattr(module, child_name, Slow(child))
    return network, reference_network


@pytest.mark.parametrize("placement", ["before", "after"])
@pytest.mark.parametrize("name", ["bn_small_inception", "bn_mlp"])
def test_outputs_and_gradients_are_those_of_the_reference(name: str, placement: str) -> None:
    network, reference_network = network_and_reference(name, placement=placement, width=0.5, dropout=0.0)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for mode in (False, True):
        torch.testing.assert_close(network.train(mode)(x), reference_network.train(mode)(x), rtol=1e-9, atol=1e-9)
    network(x).square().sum().backward()
    reference_network(x).square().sum().backward()
    torch.testing.assert_close(network.fc.weight.grad, reference_network.fc.weight.grad, rtol=1e-7, atol=1e-9)
    first, slow = (
        next(p for n, p in net.named_parameters() if n.endswith("weight")) for net in (network, reference_network)
    )
    torch.testing.assert_close(first.grad, slow.grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "options"), KINDS, ids=IDS)
def test_every_map_has_channels_last(name: str, options: dict[str, Any], training: bool) -> None:
    """A layer that returns channels first causes two copies, which cost more than many layers."""
    network = move_network(build(name, classes=3, width=0.25, auxiliary=has_row(name, Auxiliary), **options), "cpu")
    network.train(training)
    maps = 0

    def check(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal maps
        if isinstance(output, Tensor) and output.ndim == 4:
            maps += 1
            assert output.is_contiguous(memory_format=torch.channels_last), type(module).__name__

    for module in network.modules():
        module.register_forward_hook(check)
    with torch.no_grad():
        network(torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last))
    assert maps > 50 or "mlp" in name


def test_training_returns_main_then_the_later_head_then_the_earlier() -> None:
    for name in ("bn_googlenet", "bn_inception"):
        network = build(name, classes=2, auxiliary=True)
        for layer_name, value in (("fc", 0.0), ("aux1.fc2", 1.0), ("aux2.fc2", 2.0)):
            layer = network.get_submodule(layer_name)
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.constant_(layer.bias, value)  # type: ignore[arg-type]
        assert [float(o[0, 0].detach()) for o in network(torch.randn(2, 3, 64, 64))] == [0.0, 2.0, 1.0]


def test_inference_state_has_no_heads() -> None:
    network = build("bn_googlenet", classes=2, auxiliary=True)
    bare = build("bn_googlenet", classes=2)
    bare.load_state_dict(network.inference_state())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(bare.eval()(images), network.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "options", "folded"),
    [
        ("bn_inception", {"stem": "separable"}, 69),
        ("bn_googlenet", {"variant": "torchvision"}, 57),
        ("bn_mlp", {}, 3),
        ("bn_small_inception", {"stem": None}, 43),
        ("bn_small_inception", {"activation": "sigmoid"}, 43),
    ],
)
def test_every_layer_folds(name: str, options: dict[str, Any], folded: int) -> None:
    network = build(name, classes=3, **options).eval()
    for layer in network.modules():
        if isinstance(layer, BatchNorm):
            nn.init.uniform_(layer.running_var, 0.5, 2)  # type: ignore[arg-type]
            nn.init.normal_(layer.running_mean)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 64, 64)
    folding = fold(network, x)
    assert (len(folding.folded), len(folding.kept)) == (folded, 0)
    torch.testing.assert_close(folding.model(x), network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "problem", "remedy"),
    [
        ((2, 1, 64, 64), "N x 3 x H x W, not 2 x 1 x 64 x 64", "reshape the batch"),
        ((3, 64, 64), "N x 3 x H x W, not 3 x 64 x 64", "reshape the batch"),
        ((2, 64, 64, 3), "N x 3 x H x W, not 2 x 64 x 64 x 3", "x.permute(0, 3, 1, 2)"),
        ((2, 3, 64, 30), "images of 64 x 30 pixels", "at least 31 x 31"),
    ],
)
def test_images_of_the_wrong_shape_are_refused(shape: tuple[int, ...], problem: str, remedy: str) -> None:
    with pytest.raises(UsageError, match=r"^bn_googlenet ") as error:
        build("bn_googlenet", classes=3, width=0.25)(torch.zeros(shape))
    assert problem in error.value.problem
    assert remedy in error.value.remedy


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 32, 32, 3), (3, 32, 32), (2, 3, 4, 4)])
def test_wrong_shapes_are_value_errors_too(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        build("bn_googlenet", classes=2, width=0.1)(torch.zeros(shape))


@pytest.mark.parametrize("name", ["bn_googlenet", "bn_small_inception", "bn_mlp"])
@pytest.mark.parametrize("training", [True, False])
def test_fx_traces_the_networks(name: str, training: bool) -> None:
    """As they are when traced; a network with heads has several outputs in training."""
    heads = has_row(name, Auxiliary)
    found = []
    for trace in (False, True):
        network: nn.Module = build(name, classes=3, auxiliary=heads, width=0.1).train(training)
        if trace:
            network = pickle.loads(pickle.dumps(fx.symbolic_trace(network)))
        torch.manual_seed(0)
        outputs = tuple_of(network(torch.randn(4, 3, 33, 40)))
        assert len(outputs) == (3 if heads and training else 1)
        found.append(dict(enumerate(outputs)) | dict(network.named_buffers()))
    assert len(found[1]) > 5  # a graph has the layers that it calls
    assert all(torch.equal(tensor, found[0][name]) for name, tensor in found[1].items())
