"""Normalisation that the module tree does not show."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab.health.gather.operations import Hidden
from bnlab.norm import BatchNorm2d as OwnBatchNorm2d
from tests.health.gather.networks import BatchNormAct, FunctionalNorm, Net, ScaledStdConv, StdConv, traced


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


def test_a_registered_module_within_one_that_is_not_registered() -> None:
    inner = Net(lambda net, x: F.batch_norm(x, None, None, training=True))
    wrapper = nn.Sequential(inner)
    network = Net(lambda net, x: wrapper(x), inner=inner)
    assert hidden(network) == Hidden("inner", "", "batch", "none", by_batch=True)


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


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_part_shows_its_normalisation() -> None:
    scripted = torch.jit.script(nn.BatchNorm2d(3).eval())
    found = traced(nn.Sequential(nn.Conv2d(3, 3, 1), scripted))
    assert found.operations == 1
    assert not any(one.statistics == "outside" for one in found.hidden)
