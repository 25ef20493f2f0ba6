"""Statistics that still hold the initial ones are told from recalibrated ones with the same counters."""

import pytest
import torch
from torch import Tensor, nn

from bnlab import health
from bnlab.norm.recalibrate import recalibrate
from tests.health.checks.named_networks import images, small_network, sound_network, teacher_batches


def trained(network: nn.Sequential, momentum: float, batches: list[Tensor]) -> nn.Sequential:
    """The network after forwards in training mode with fixed weights."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = momentum
    network.train()
    with torch.no_grad():
        for batch in batches:
            network(batch)
    return network.eval()


def test_finds_the_weight_of_the_initial_statistics() -> None:
    teacher = sound_network()
    batches = teacher_batches(teacher)
    network = trained(small_network(), 0.05, images(640, 32, seed=5))  # (1 - 0.05)^20 = 35.8%
    finding = health.diagnose(network, batches)["BN007"]
    assert set(finding.layers) == {"bn1", "bn2"}
    assert finding.numbers["expected"] == pytest.approx(0.95**20)
    assert finding.numbers["weight"] == pytest.approx(0.95**20, abs=0.05)
    assert finding.numbers["updates"] == 20
    assert "0.05" in finding.cause and "20" in finding.cause


def test_finds_statistics_that_were_never_updated() -> None:
    finding = health.diagnose(small_network(), images(256, 32), select=["BN007"]).findings[0]
    assert finding.severity == "warn"  # without labels, the cost is not known
    assert finding.numbers["weight"] == pytest.approx(1)


def test_what_costs_nothing_is_advice() -> None:
    network = small_network()  # its own teacher, by the initial statistics
    finding = health.diagnose(network, teacher_batches(network), select=["BN007"]).findings[0]
    assert finding.severity == "info"
    assert finding.cost is None


@pytest.mark.parametrize("seed", [*range(5)])
def test_is_silent_on_recalibrated_statistics_of_few_batches(seed: int) -> None:
    network = sound_network(seed)
    recalibrate(network, images(96, 32, seed=7))  # 3 batches at momentum 0.1: by the counter, 73% would be initial
    assert int(network.bn1.num_batches_tracked) == 3  # type: ignore[operator, arg-type]
    report = health.diagnose(network, images(256, 32), select=["BN007"])
    assert not report.findings and not report.skipped


def test_is_silent_below_1_percent() -> None:
    network = trained(small_network(), 0.1, images(1440, 32, seed=5))  # 0.9^45 = 0.87%
    assert not health.diagnose(network, images(256, 32), select=["BN007"]).findings
    network = trained(small_network(), 0.1, images(320, 32, seed=5))  # 0.9^10 = 35%
    assert health.diagnose(network, images(256, 32), select=["BN007"]).findings


def planted(weight: float, updates: int) -> health.Report:
    """The report on layers whose statistics are those of the images but for this weight of the initial ones."""
    layers = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)).eval()
    generator = torch.Generator().manual_seed(5)
    batches = [10 * torch.randn(64, 4, 16, 16, generator=generator) for _ in range(32)]
    recalibrate(layers, batches)
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None and layer.running_var is not None
            layer.running_mean.mul_(1 - weight)
            layer.running_var.lerp_(torch.ones(()), weight)
            assert layer.num_batches_tracked is not None
            layer.num_batches_tracked.fill_(updates)
    return health.diagnose(layers, batches, images=None, select=["BN007"])


@pytest.mark.parametrize(
    ("weight", "updates", "found"),
    [
        (0.9**43, 43, True),  # 1.08%
        (0.9**44, 44, False),  # 0.97%
        (0.40, 5, True),  # by the counter, 59%
        (0.25, 5, False),
        (0.50, 10, True),  # by the counter, 35%
        (0.60, 10, False),
    ],
)
def test_the_weight_must_be_that_of_the_counter(weight: float, updates: int, found: bool) -> None:
    report = planted(weight, updates)
    assert [round(f.numbers["weight"], 3) for f in report.findings] == [round(weight, 3)] * found


def test_layers_of_the_same_counter_must_agree() -> None:
    """The first of three layers is off as after 20 batches; the others say that there were more."""
    network = nn.Sequential(nn.BatchNorm2d(3), sound_network()).eval()
    generator = torch.Generator().manual_seed(5)
    batches = [10 * torch.randn(64, 3, 12, 12, generator=generator) for _ in range(20)]
    recalibrate(network, batches)
    first = network[0]
    assert isinstance(first, nn.BatchNorm2d) and first.running_var is not None and first.running_mean is not None
    first.running_var.lerp_(torch.ones(3), 0.9**20)
    first.running_mean.mul_(1 - 0.9**20)
    assert not health.diagnose(network, batches, images=None, select=["BN007"]).findings
    assert first.num_batches_tracked is not None
    first.num_batches_tracked.add_(1)  # now it has a separate counter
    (finding,) = health.diagnose(network, batches, images=None, select=["BN007"]).findings
    assert finding.layers == ("0",)


def test_is_silent_where_one_batch_cannot_tell() -> None:
    assert not health.diagnose(small_network(), images(32, 32), select=["BN007"]).findings
