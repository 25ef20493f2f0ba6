import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnlab import health
from tests.health.checks.networks import sound_network, teacher_batches
from tests.health.gather.networks import FunctionalNorm, Net, ScaledStdConv, StdConv

IMAGES = [torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def test_finds_layers_in_a_plain_list_and_restores_them() -> None:
    norms = [nn.BatchNorm2d(3), nn.BatchNorm2d(3)]
    network = nn.Sequential(Net(lambda net, x: norms[1](norms[0](net.conv(x))), conv=nn.Conv2d(3, 3, 1))).eval()
    found = health.diagnose(network, IMAGES)["BN022"]
    assert (found.severity, found.layers) == ("warn", ("0",))
    assert found.numbers == {"calls": 2, "by_batch": 2}  # eval() did not reach them
    for layer in norms:
        assert layer.num_batches_tracked == 0
        assert torch.equal(layer.running_var, torch.ones(3))  # type: ignore[arg-type]


def test_finds_a_layer_that_each_forward_builds() -> None:
    network = Net(lambda net, x: nn.BatchNorm2d(3)(net.conv(x)), conv=nn.Conv2d(3, 3, 1)).eval()
    found = health.diagnose(network, IMAGES)["BN022"]
    assert (found.severity, found.layers, found.numbers) == ("warn", ("",), {"calls": 1, "by_batch": 1})
    assert "anew" in found.message


@pytest.mark.parametrize(("keep", "severity"), [("attribute", "warn"), ("buffer", "info")])
def test_finds_a_function_with_statistics(keep: str, severity: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), FunctionalNorm(keep)).eval()
    found = health.diagnose(network, IMAGES)["BN022"]
    assert (found.severity, found.layers, found.numbers) == (severity, ("1",), {"calls": 1, "by_batch": 0})


def test_finds_a_function_that_normalises_by_the_batch() -> None:
    network = Net(lambda net, x: F.batch_norm(net.conv(x), None, None, training=True), conv=nn.Conv2d(3, 3, 1))
    assert health.diagnose(network.eval(), IMAGES)["BN022"].severity == "warn"


def test_is_silent_on_registered_layers() -> None:
    network = sound_network()
    report = health.diagnose(network, teacher_batches(network))
    assert "BN022" not in report
    assert "BN022" not in report.skipped


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(StdConv(3, 4, 3), nn.BatchNorm2d(4)),
        nn.Sequential(ScaledStdConv(3, 4, 3), nn.ReLU()),
        Net(lambda net, x: F.instance_norm(net.conv(x)), conv=nn.Conv2d(3, 3, 1)),
        Net(lambda net, x: F.group_norm(net.conv(x), 1), conv=nn.Conv2d(3, 3, 1)),
    ],
    ids=["standardised", "scaled", "instance", "group"],
)
def test_is_silent_on_what_normalises_no_batch(network: nn.Module) -> None:
    assert "BN022" not in health.diagnose(network.eval(), IMAGES)
