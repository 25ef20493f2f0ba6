"""What is found and described of each layer, alone and with what a forward shows."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bnlab.health.evidence import LayerEvidence
from bnlab.health.gather.layers import describe, find_layers, with_trace
from bnlab.norm import BatchNorm2d as OwnBatchNorm2d
from tests.health.gather.networks import BatchNormAct, DropPath, Net, traced


def described(network: nn.Module, name: str = "bn") -> LayerEvidence:
    layers = find_layers(network)
    return with_trace(describe(name, layers[name]), traced(network), network)


def activation(network: nn.Module, name: str = "bn") -> str | None:
    return described(network, name).activation


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda net, x: net.relu(net.bn(x)), "relu"),
        (lambda net, x: F.relu(net.bn(x)), "relu"),
        (lambda net, x: F.relu(net.bn(x), inplace=True), "relu"),
        (lambda net, x: torch.relu_(net.bn(x)), "relu"),
        (lambda net, x: net.bn(x).relu_(), "relu"),
        (lambda net, x: nn.ReLU()(net.bn(x)), "relu"),
        (lambda net, x: F.leaky_relu(net.bn(x)), "leakyrelu"),
        (lambda net, x: net.relu(net.drop(net.identity(net.bn(x)))), "relu"),
        (lambda net, x: net.relu(F.dropout(net.bn(x), training=net.training)), "relu"),
        (lambda net, x: net.relu(net.path(net.bn(x))), "relu"),
        (lambda net, x: net.relu(net.flatten(net.bn(x)).view(4, -1)), "relu"),
        (lambda net, x: net.relu(net.bn(x) + x), None),
        (lambda net, x: net.relu(x.add_(net.bn(x))), None),
        (lambda net, x: net.relu(y := net.bn(x)) + y, None),
        (lambda net, x: net.relu(y := net.bn(x)) + net.conv(y), None),
        (lambda net, x: net.conv(net.relu(y := net.bn(x.clone()))) + y, "relu"),  # in place: y is rectified
        (lambda net, x: net.conv(net.bn(x)), None),
        (lambda net, x: net.relu(net.conv(net.bn(x))), None),
        (lambda net, x: checkpoint(lambda y: net.relu(net.bn(y)), x, use_reentrant=False), "relu"),
        (lambda net, x: checkpoint(lambda y: net.relu(net.bn(y)), x, use_reentrant=True), "relu"),
    ],
    ids=[
        *("module", "function", "in place", "torch", "method", "unregistered", "leaky"),
        *("identity and dropout", "functional dropout", "drop path", "views"),
        *("residual", "residual in place", "read twice", "read by a layer", "in-place module, then read"),
        *("linear", "not directly", "checkpoint", "reentrant checkpoint"),
    ],
)
def test_activation(run: Callable[[Net, Tensor], Tensor], expected: str | None, request: pytest.FixtureRequest) -> None:
    network = Net(
        run,
        bn=nn.BatchNorm2d(3),
        relu=nn.ReLU(inplace="in-place module" in request.node.callspec.id),
        conv=nn.Conv2d(3, 3, 1),
        drop=nn.Dropout(),
        identity=nn.Identity(),
        path=DropPath(),
        flatten=nn.Flatten(),
    )
    assert activation(network) == expected


@pytest.mark.parametrize("in_place", [False, True])
def test_activation_within_the_layer(in_place: bool) -> None:
    inside = Net(
        lambda net, x: net.conv(net.bn(x)) + net.bn(x), bn=BatchNormAct(3, nn.ReLU(in_place)), conv=nn.Conv2d(3, 3, 1)
    )
    assert activation(inside) == "relu"
    then = Net(lambda net, x: torch.sigmoid(net.bn(x)), bn=BatchNormAct(3, nn.ReLU(in_place)))
    assert activation(then) == "relu"
    none = Net(lambda net, x: torch.sigmoid(net.bn(x)), bn=BatchNormAct(3, nn.Identity()))
    assert activation(none) == "sigmoid"
    own = Net(lambda net, x: net.bn(x, relu=True), bn=OwnBatchNorm2d(3))
    assert activation(own) == "relu"


def test_a_lazy_layer_that_has_been_run() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.LazyBatchNorm2d(), nn.ReLU())
    network(torch.randn(4, 3, 6, 6))
    assert activation(network, "1") == "relu"


def test_all_layers_that_keep_statistics_are_found() -> None:
    frozen = Net(lambda net, x: x * net.running_var + net.running_mean)
    frozen.register_buffer("running_mean", torch.zeros(1, 3, 1, 1))
    frozen.register_buffer("running_var", torch.ones(1, 3, 1, 1))
    network = nn.Sequential(
        nn.Conv2d(3, 3, 1), BatchNormAct(3, nn.ReLU()), nn.InstanceNorm2d(3), nn.GroupNorm(1, 3), frozen
    )
    assert {name: describe(name, layer).family for name, layer in find_layers(network).items()} == {
        "1": "batch",
        "2": "instance",
        "4": "frozen",
    }


def test_the_layer_before_and_its_bias_are_described() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 6), nn.Flatten(), nn.BatchNorm1d(2), nn.Linear(2, 2))
    layer = described(network, "2")
    assert (layer.before, layer.before_kind, layer.before_shared) == ("0", "Conv2d", False)
    assert layer.before_bias == pytest.approx(network[0].bias.detach().numpy())
    assert (layer.values_per_image, layer.dims) == (1, 2)


def test_population_statistics_of_earlier_weights_are_marked() -> None:
    layer = OwnBatchNorm2d(3, statistics="population")
    assert describe("bn", layer).outdated
    layer.num_batches_tracked.fill_(4)  # type: ignore[union-attr]
    assert not describe("bn", layer).outdated
    assert not describe("bn", OwnBatchNorm2d(3)).outdated
