"""Statistics that are not finite, negative or too large for float16."""

import math

import pytest
import torch
from torch import Tensor, nn

from bnlab import health
from tests.health.checks.named_networks import images, sound_network, teacher_batches


def statistics(network: nn.Sequential, name: str, key: str) -> Tensor:
    found = network.get_submodule(name).get_buffer(key)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("running_mean", math.nan, "nan"),
        ("running_var", math.nan, "nan"),
        ("running_var", math.inf, "infinite"),
        ("running_mean", -math.inf, "infinite"),
        ("running_var", -0.25, "negative"),
    ],
)
def test_finds_broken_values(key: str, value: float, kind: str) -> None:
    network = sound_network()
    batches = teacher_batches(network)
    statistics(network, "bn1", key)[3] = value
    finding = health.diagnose(network, batches)["BN008"]
    assert (finding.severity, finding.layers) == ("error", ("bn1",))
    assert finding.numbers == {"nan": 0, "infinite": 0, "negative": 0, "channels": 1} | {kind: 1}
    assert finding.safety == "safe"  # recalibration repairs it


def test_says_what_nan_costs() -> None:
    network = sound_network()
    batches = teacher_batches(network)
    statistics(network, "bn2", "running_var")[0] = math.nan
    finding = health.diagnose(network, batches)["BN008"]
    assert finding.cost is not None
    assert finding.cost.before == 0  # every output is NaN


def test_recalibration_does_not_repair_parameters() -> None:
    network = sound_network()
    statistics(network, "bn2", "running_mean")[0] = math.nan
    assert isinstance(network.bn2, nn.BatchNorm2d)
    network.bn2.weight.data[0] = math.nan
    finding = health.diagnose(network, images(64, 32), select=["BN008"]).findings[0]
    assert finding.safety == "display only"
    assert "gamma or beta" in finding.cause
    assert "older checkpoint" in finding.remedy


def test_is_silent_on_sound_statistics() -> None:
    network = sound_network()
    assert "BN008" not in health.diagnose(network, teacher_batches(network))


@pytest.mark.parametrize(("largest", "found"), [(65000.0, False), (66000.0, True)])
def test_advises_before_a_conversion_to_float16(largest: float, found: bool) -> None:
    network = sound_network()
    statistics(network, "bn1", "running_var")[0] = largest
    findings = health.diagnose(network, images(64, 32), select=["BN008"]).findings
    assert [(f.severity, f.layers, f.numbers["largest"]) for f in findings] == [("info", ("bn1",), largest)] * found


def test_finds_a_factor_that_float16_cannot_hold() -> None:
    network = sound_network()
    layer = network.bn2
    assert isinstance(layer, nn.BatchNorm2d)
    layer.eps = 1e-12
    statistics(network, "bn2", "running_var")[0] = 0.0  # gamma / sqrt(eps) is a million
    finding = health.diagnose(network, images(64, 32), select=["BN008"]).findings[0]
    assert finding.numbers["largest"] == pytest.approx(1e6)
    network.half()
    report = health.diagnose(network, [x.half() for x in images(64, 32)], select=["BN008"])
    assert [f.severity for f in report.findings] == ["warn"]


def test_finds_what_a_conversion_to_float16_broke() -> None:
    network = sound_network()
    statistics(network, "bn1", "running_var")[0] = 1e5
    network.half()
    assert torch.isinf(statistics(network, "bn1", "running_var")[0])
    finding = health.diagnose(network, [x.half() for x in images(64, 32)], select=["BN008"]).findings[0]
    assert finding.severity == "error"
    assert "float16" in finding.cause
