"""Layers that one forward uses more than once."""

import pytest
import torch
from torch import Tensor, nn

from bnlab import health, norm


class Shared(nn.Module):
    """One layer for two inputs, of which the second is shifted."""

    def __init__(self, shift: float = 0.0, scale: float = 1.0, *, own: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bn, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.other = nn.BatchNorm2d(4) if own else self.bn
        self.shift, self.scale = shift, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.bn(x) + self.other(self.scale * x.flip(-1) + self.shift)).mean((2, 3)))


def shared(shift: float = 0.0, scale: float = 1.0, *, own: bool = False) -> tuple[nn.Module, list[Tensor]]:
    network = Shared(shift, scale, own=own)
    images = [torch.randn(32, 4, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    norm.recalibrate(network, images)
    return network.eval(), images


def test_finds_uses_of_different_mean() -> None:
    found = health.diagnose(*shared(shift=1.0))["reused-layer"]
    assert (found.id, found.severity, found.layers) == ("BN011", "warn", ("bn",))
    assert (found.numbers["calls"], found.numbers["off_share"]) == (2, 1.0)
    assert found.numbers["mean_off"] == pytest.approx(1, rel=0.1)
    assert found.numbers["variance_off"] == pytest.approx(1, rel=1e-4)


def test_finds_uses_of_different_variance() -> None:
    found = health.diagnose(*shared(scale=2.0))["BN011"]
    assert found.severity == "warn"
    assert found.numbers["variance_off"] == pytest.approx(4, rel=1e-3)


@pytest.mark.parametrize("shift", [0.0, 0.05])
def test_is_advice_where_uses_are_alike(shift: float) -> None:
    """0.05 standard deviations are significant in paired images, but below the threshold of 0.1."""
    found = health.diagnose(*shared(shift=shift))["BN011"]
    assert (found.severity, found.numbers["off_share"]) == ("info", 0.0)


def test_is_silent_on_layers_of_their_own() -> None:
    report = health.diagnose(*shared(shift=1.0, own=True))
    assert "BN011" not in report
    assert "BN011" in report.skipped
