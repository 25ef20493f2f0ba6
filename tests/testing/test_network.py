"""Sound networks pass, and what is wrong with others is named."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnlab import nets
from bnlab.errors import UsageError
from bnlab.health import Report
from bnlab.testing import check_network

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def fresh() -> nn.Sequential:
    """Untrained, in evaluation mode."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 4)),
    ).eval()


class BuiltInForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d(8)(self.convolution(x)).mean((2, 3))  # type: ignore[no-any-return]


def test_a_fresh_network_passes() -> None:
    report = check_network(fresh(), IMAGES)
    assert isinstance(report, Report)
    assert report.images == 16
    assert not report.at_or_above("error")
    assert "BN020" not in report.skipped  # another memory format was tried
    assert all(finding.id < "BN100" for finding in report.findings)


@pytest.mark.parametrize("name", ["smallnet", "inception"])
def test_the_networks_of_bnlab_pass(name: str) -> None:
    torch.manual_seed(0)
    size = 32 if name == "smallnet" else 64
    check_network(nets.build(name, num_classes=4).eval(), torch.randn(8, 3, size, size))
