"""Momenta out of the ordinary are reported with what TensorFlow calls them, and those that are not used are not."""

import pytest
import torch
from torch import nn

from bnlab import health
from bnlab.norm.freeze import freeze
from tests.health.checks.named_networks import small_network, sound_network, teacher_batches


def with_momentum(momentum: float | None, network: nn.Sequential | None = None) -> health.Report:
    network = network or sound_network()
    batches = teacher_batches(network, 64)
    layer = network.bn2
    assert isinstance(layer, nn.BatchNorm2d)
    layer.momentum = momentum
    return health.diagnose(network, batches, select=["BN006"])


@pytest.mark.parametrize(
    ("momentum", "severity"), [(0.9, "warn"), (0.5, "warn"), (1.0, "warn"), (-0.1, "error"), (1.5, "error")]
)
def test_finds_an_extreme_momentum(momentum: float, severity: str) -> None:
    (finding,) = with_momentum(momentum).findings
    assert (finding.id, finding.severity, finding.layers) == ("BN006", severity, ("bn2",))
    assert finding.numbers == {"momentum": momentum, "tensorflow": pytest.approx(1 - momentum)}


def test_finds_momentum_0_which_keeps_the_initial_statistics() -> None:
    (finding,) = with_momentum(0.0, small_network()).findings
    assert finding.severity == "error"
    (finding,) = with_momentum(0.0).findings  # with statistics of images, it is a way to freeze them
    assert finding.severity == "info"


def test_the_command_sets_what_tensorflow_calls_it() -> None:
    (finding,) = with_momentum(0.99).findings
    model = sound_network()
    exec(finding.command, {"model": model})
    assert {layer.momentum for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)} == {0.01}


@pytest.mark.parametrize("momentum", [0.1, 0.01, 0.499, None])
def test_is_silent_on_usual_momenta(momentum: float | None) -> None:
    assert not with_momentum(momentum).findings


def test_is_silent_on_layers_that_do_not_use_it() -> None:
    frozen = sound_network()
    freeze(frozen)
    assert not with_momentum(0.9, frozen).findings
    untracked = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.9, track_running_stats=False)).eval()
    assert not health.diagnose(untracked, [torch.randn(8, 3, 8, 8)], select=["BN006"]).findings
