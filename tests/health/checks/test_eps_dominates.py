"""Variances below eps are found by their share of the channels."""

import pytest
from torch import nn

from bnlab import health
from bnlab.norm.recalibrate import recalibrate
from tests.health.checks.named_networks import images, sound_network, teacher_batches


def with_scaled_channels(number: int, factor: float) -> nn.Sequential:
    """A network whose bn2 has this number of its 16 channels with another standard deviation."""
    network = sound_network()
    assert isinstance(network.conv2, nn.Conv2d)
    network.conv2.weight.data[:number] *= factor
    recalibrate(network, images(256, 32, seed=3))
    return network


@pytest.mark.parametrize(("number", "severity"), [(1, "info"), (8, "info"), (9, "warn"), (16, "warn")])
def test_finds_channels_below_eps(number: int, severity: str) -> None:
    finding = health.diagnose(with_scaled_channels(number, 1e-4), images(128, 32))["BN009"]
    assert (finding.layers, finding.severity) == (("bn2",), severity)
    assert finding.numbers["below_eps"] == number / 16
    assert finding.numbers["eps"] == 1e-5


def test_variances_not_far_below_eps_are_advice() -> None:
    network = with_scaled_channels(16, 1e-3)
    finding = health.diagnose(network, images(128, 32), select=["BN009"]).findings[0]
    assert finding.severity == "info"
    assert 1e-7 < finding.numbers["median"] < 1e-5  # eps / 100 and eps
    assert isinstance(network.bn2, nn.BatchNorm2d)
    network.bn2.eps *= 100
    assert health.diagnose(network, images(128, 32), select=["BN009"]).findings[0].severity == "warn"


def test_is_silent_where_eps_is_small() -> None:
    network = sound_network()
    assert "BN009" not in health.diagnose(network, teacher_batches(network))


def test_counts_channels_below_10_eps() -> None:
    network = sound_network()
    variance = network.bn2.running_var
    assert isinstance(network.bn2, nn.BatchNorm2d) and variance is not None
    network.bn2.eps = 1.5 * float(variance.max())  # type: ignore[operator, union-attr]
    finding = health.diagnose(network, images(128, 32))["BN009"]
    assert finding.numbers["below_eps"] == finding.numbers["below_10_eps"] == 1


def test_constant_channels_do_not_count() -> None:
    assert not health.diagnose(with_scaled_channels(12, 0.0), images(128, 32), select=["BN009"]).findings


def test_without_images_of_the_layer_the_running_variance_tells() -> None:
    """A layer that the forward never reaches."""
    network = nn.Sequential(sound_network(), nn.ModuleDict({"unused": nn.BatchNorm2d(4)})).eval()
    unused = network.get_submodule("1.unused")
    unused.get_buffer("running_var").fill_(1e-6)
    report = health.diagnose(network, images(64, 32), forward=lambda model, x: model[0](x), select=["BN009"])
    assert report.findings[0].layers == ("1.unused",)
