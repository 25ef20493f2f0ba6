"""What one forward shows of odd networks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bnlab.health.gather.layers import find_layers
from bnlab.health.gather.operations import Hidden
from bnlab.health.gather.trace import Trace, trace
from bnlab.norm import BatchNorm2d as OwnBatchNorm2d


class Net(nn.Module):
    """Has the given modules, and runs a function of itself and the input."""

    def __init__(self, run: Callable[["Net", Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class BatchNormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d does it."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(self.drop(x))


class StdConv(nn.Conv2d):
    """Standardises its weights by batch_norm, as timm's StdConv2d does."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, padding=1)


class ScaledStdConv(nn.Conv2d):
    """As timm's ScaledStdConv2d; the weights are first computed of others, as a parametrisation would."""

    def forward(self, x: Tensor) -> Tensor:
        flat = (self.weight * 2 - torch.ones_like(self.weight)).double().reshape(1, self.out_channels, -1)
        gain = self.weight.new_full((self.out_channels,), 0.5).double()
        weight = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0)
        return F.conv2d(x, weight.to(x).reshape_as(self.weight), self.bias, padding=1)


class DropPath(nn.Module):
    """Returns its input in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


class FunctionalNorm(nn.Module):
    """Normalises by a function, with statistics where `keep` puts them."""

    def __init__(self, keep: str) -> None:
        super().__init__()
        statistics = {"mu": torch.zeros(3), "sigma": torch.ones(3)}
        for name, tensor in statistics.items():
            if keep == "buffer":
                self.register_buffer(name, tensor)
            elif keep == "domains":
                self.register_buffer(name, tensor.repeat(2, 1))
            elif keep == "parameter":
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                setattr(self, name, tensor)
        self.keep, self.domain = keep, 1

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mu, self.sigma
        if self.keep == "domains":
            mean, var = mean[torch.tensor([self.domain])][0], var[torch.tensor([self.domain])][0]
        return F.batch_norm(x, mean, var, training=self.training)


def traced(network: nn.Module, images: int = 4) -> Trace:
    x = torch.randn(images, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    network.eval()
    return trace(network, find_layers(network), lambda: network(x))


def activation(network: nn.Module, name: str = "bn") -> str | None:
    from bnlab.health.gather.layers import describe, with_trace

    layers = find_layers(network)
    return with_trace(describe(name, layers[name]), traced(network), network).activation


# Normalisation that the module tree does not show.


def hidden(network: nn.Module, images: int = 4) -> Hidden:
    found = traced(network, images).hidden
    assert len(found) == 1
    return next(iter(found))


@pytest.mark.parametrize("wrapped", [False, True], ids=["leaf", "non-leaf"])
@pytest.mark.parametrize(
    ("keep", "statistics"),
    [("buffer", "registered"), ("domains", "registered"), ("parameter", "registered"), ("attribute", "outside")],
)
def test_functional_batch_norm(keep: str, statistics: str, wrapped: bool) -> None:
    norm = FunctionalNorm(keep)
    if wrapped:
        norm.conv = nn.Conv2d(3, 3, 1)
    network = nn.Sequential(nn.Conv2d(3, 3, 1), norm)
    assert hidden(network) == Hidden("1", "", "batch", statistics, by_batch=False)  # type: ignore[arg-type]


def test_functional_batch_norm_without_statistics() -> None:
    network = Net(lambda net, x: F.batch_norm(net.conv(x), None, None, training=True), conv=nn.Conv2d(3, 3, 1))
    assert hidden(network) == Hidden("", "", "batch", "none", by_batch=True)


def test_functional_batch_norm_on_the_input_itself() -> None:
    assert hidden(Net(lambda net, x: F.batch_norm(x, None, None, training=True))).statistics == "none"


def test_layer_built_inside_forward() -> None:
    network = nn.Sequential(Net(lambda net, x: nn.BatchNorm2d(3)(net.conv(x)), conv=nn.Conv2d(3, 3, 1)))
    assert hidden(network) == Hidden("0", "BatchNorm2d", "batch", "rebuilt", by_batch=True)


def test_layers_in_a_plain_list_keep_their_statistics() -> None:
    norms = [nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval()]
    before = [{k: v.clone() for k, v in norm.state_dict().items()} for norm in norms]
    network = Net(lambda net, x: norms[1](norms[0](net.conv(x))), conv=nn.Conv2d(3, 3, 1))
    found = traced(network)
    assert found.hidden == {
        Hidden("", "BatchNorm2d", "batch", "outside", by_batch=True): 1,
        Hidden("", "BatchNorm2d", "batch", "outside", by_batch=False): 1,
    }
    assert not torch.equal(norms[0].running_mean, before[0]["running_mean"])  # type: ignore[arg-type]
    found.restore()
    for norm, state in zip(norms, before, strict=True):
        assert all(torch.equal(norm.state_dict()[key], value) for key, value in state.items())


def test_statistics_in_a_plain_list_are_restored_after_an_error() -> None:
    norm = nn.BatchNorm2d(3)

    def run(net: Net, x: Tensor) -> Tensor:
        norm(x)
        raise RuntimeError("the model's own")

    with pytest.raises(RuntimeError, match="own"):
        traced(Net(run))
    assert norm.num_batches_tracked == 0
    assert not norm.running_mean.any()  # type: ignore[union-attr]


def test_functional_instance_norm() -> None:
    network = Net(lambda net, x: F.instance_norm(net.conv(x)), conv=nn.Conv2d(3, 3, 1))
    assert hidden(network) == Hidden("", "", "instance", "none", by_batch=True)
    mean, var = torch.zeros(3), torch.ones(3)
    by_stored = Net(lambda net, x: F.instance_norm(x, mean, var, use_input_stats=False))
    assert hidden(by_stored) == Hidden("", "", "instance", "outside", by_batch=False)


def test_adaptive_instance_norm_by_batch_norm_of_one_row() -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        n, c, *rest = x.shape
        zeros = torch.zeros(n * c)
        return F.batch_norm(x.reshape(1, n * c, *rest), zeros, zeros + 1, training=True).reshape(x.shape)

    assert hidden(Net(run)) == Hidden("", "", "instance", "none", by_batch=True)
    assert hidden(Net(run), images=1).kind == "batch"  # one image does not tell


@pytest.mark.parametrize("kind", [StdConv, ScaledStdConv])
def test_standardised_convolutions_are_no_normalisation_of_values(kind: type[nn.Conv2d]) -> None:
    network = nn.Sequential(kind(3, 3, 3), nn.ReLU()).to(memory_format=torch.channels_last)
    found = traced(network)
    assert (found.operations, found.hidden) == (1, {})


def test_registered_layers_are_not_hidden() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), BatchNormAct(3, nn.ReLU()), nn.InstanceNorm2d(3), OwnBatchNorm2d(3)
    )
    found = traced(network)
    assert not found.hidden
    assert found.operations >= 3


# How layers are used.


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


@pytest.mark.parametrize("between", [nn.Identity(), nn.Dropout2d(), DropPath(), nn.Flatten(0, 0)])
def test_what_returns_its_input_does_not_come_before_a_layer(between: nn.Module) -> None:
    found = traced(nn.Sequential(nn.Conv2d(3, 3, 1), between, nn.BatchNorm2d(3)))
    assert found.used["2"].before == "0"
    assert found.reads["0"] == 1


def test_flattened_values_come_from_the_layer_that_made_them() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 6), nn.Flatten(), nn.BatchNorm1d(2), nn.Linear(2, 2))
    assert traced(network).used["2"].before == "0"


def test_residual_adds_and_branches_count_as_reads() -> None:
    network = Net(
        lambda net, x: net.bn2(net.conv(x)) + net.bn(x),
        bn=nn.BatchNorm2d(3),
        conv=nn.Conv2d(3, 3, 1),
        bn2=nn.BatchNorm2d(3),
    )
    found = traced(network)
    assert found.used["bn2"].before == "conv"
    assert found.used["bn"].before is None  # the input of the network
    assert (found.reads["bn"], found.reads["conv"]) == (1, 1)
    assert [*found.used] == ["bn2", "bn"]  # in the order of the calls


def test_a_shared_layer_is_called_twice() -> None:
    network = Net(lambda net, x: net.bn(net.conv(net.bn(x))), bn=nn.BatchNorm2d(3), conv=nn.Conv2d(3, 3, 1))
    found = traced(network)
    assert found.used["bn"].calls == 2
    assert found.used["bn"].shape == (4, 3, 6, 6)


def test_hooks_of_the_model_are_run_and_seen() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    calls: list[str] = []
    network[0].register_forward_hook(lambda *_: calls.append("0"))
    network[1].register_forward_hook(lambda module, args, output: output * 2)  # so ReLU does not read the layer's
    found = traced(network)
    assert calls == ["0"]
    assert found.used["1"].before == "0"
    assert [len(module._forward_hooks) for module in network] == [1, 1, 0]
    assert not nn.modules.module._global_forward_hooks


def test_a_lazy_layer_that_has_been_run() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.LazyBatchNorm2d(), nn.ReLU())
    network(torch.randn(4, 3, 6, 6))
    assert activation(network, "1") == "relu"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_part_shows_its_normalisation() -> None:
    scripted = torch.jit.script(nn.BatchNorm2d(3).eval())
    found = traced(nn.Sequential(nn.Conv2d(3, 3, 1), scripted))
    assert found.operations == 1
    assert not any(one.statistics == "outside" for one in found.hidden)


def test_layers_that_are_never_reached_are_not_used() -> None:
    network = Net(lambda net, x: net.conv(x), bn=nn.BatchNorm2d(3), conv=nn.Conv2d(3, 3, 1))
    assert traced(network).used == {}
