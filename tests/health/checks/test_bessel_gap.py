"""N values a channel: the running variance is N / (N - 1) times that of the batch."""

import pytest
import torch
from torch import Tensor, nn

from bnlab.health import diagnose


def network(positions: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool1d(positions), nn.BatchNorm1d(6)).eval()


def batches(size: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size, 6, 12) for _ in range(3)]


@pytest.mark.parametrize(
    ("size", "positions", "values", "severity"),
    [(8, 1, 8, "info"), (8, 2, 16, "info"), (20, 1, 20, "info"), (6, 1, 6, "info"), (5, 1, 5, "warn")],
)
def test_finds_few_values(size: int, positions: int, values: int, severity: str) -> None:
    finding = diagnose(network(positions), batches(size), select=["BN104"])["BN104"]
    assert finding.layers == ("1",)
    assert finding.numbers == {"values": values, "factor": values / (values - 1)}
    assert finding.severity == severity


@pytest.mark.parametrize(("size", "positions"), [(32, 1), (21, 1), (4, 6)])
def test_is_silent_on_more_values(size: int, positions: int) -> None:
    assert "BN104" not in diagnose(network(positions), batches(size), select=["BN104"])


def test_the_layers_with_the_fewest_values_come_first() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool1d(3), nn.BatchNorm1d(6), nn.AdaptiveAvgPool1d(1), nn.BatchNorm1d(6)).eval()
    assert diagnose(model, batches(6), select=["BN104"])["BN104"].layers == ("3", "1")


def test_several_rows_of_an_image_count() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x.transpose(1, 2).flatten(0, 1))  # N * 12 x C

    assert "BN104" not in diagnose(Rows().eval(), batches(4), select=["BN104"])


def test_layers_without_running_statistics_have_no_gap() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.BatchNorm1d(6, track_running_stats=False)).eval()
    assert "BN104" not in diagnose(model, batches(8), select=["BN104"])
