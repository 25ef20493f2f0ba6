import pytest
import torch
from torch import nn

from bnlab import health

ID = "BN115"


def network() -> nn.Module:
    """Its layer gets the images themselves."""
    return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 2)).eval()


def images(largest: float) -> list[torch.Tensor]:
    x = torch.randn(32, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x[17, 0, 2, 1] = -largest
    return list(x.split(8))


@pytest.mark.parametrize(
    ("largest", "severity"),
    [(40_000.0, "info"), (65_503.0, "info"), (70_000.0, "warn")],
    ids=["half", "below", "above"],
)
def test_finds_values_too_large_for_float16(largest: float, severity: str) -> None:
    finding = health.diagnose(network(), images(largest), select=[ID])[ID]
    assert finding.severity == severity and finding.layers == ("0",)
    assert finding.numbers["largest"] == largest


@pytest.mark.parametrize("batches", [1, 4])
def test_finds_infinity(batches: int) -> None:
    x = images(1.0)
    for batch in x[:batches]:
        batch[0, 0, 0, 0] = float("inf")
    finding = health.diagnose(network(), x, select=[ID])[ID]
    assert finding.severity == "error" and finding.numbers == {"largest": None}


def test_is_silent_below_half() -> None:
    assert not health.diagnose(network(), images(32_752.0), select=[ID]).findings


def test_is_silent_on_a_layer_that_gets_empty_inputs_alone() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.spare = nn.BatchNorm2d(1), nn.BatchNorm2d(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.spare(x[:0])
            return self.norm(x)

    assert ID not in health.diagnose(Routed().eval(), images(1.0), select=[ID])
