import torch
from torch import nn

from bnlab import health
from tests.health.checks.photos import batches, normalised, photos, trained_on

ID = "BN114"


def deep(step: float) -> nn.Sequential:
    """Twelve layers, whose running standard deviations are too large by 1 + step, 1 + 2 step, ...

    Each layer passes on a deviation that is too small by its own factor, which the next one's statistics count in.
    """
    layers: list[nn.Module] = []
    for i in range(12):
        bn = nn.BatchNorm2d(8, eps=0.0, affine=False)
        assert bn.running_var is not None
        bn.running_var.fill_(((1 + step * i) / (1 + step * max(i - 1, 0))) ** 2)
        layers.append(bn)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def test_finds_a_shift_that_grows() -> None:
    """Of a channel with variance 1, running deviation 1 + s makes the distance s / (1 + s)."""
    x = torch.randn(256, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    finding = health.diagnose(deep(0.1), batches(x), select=[ID])[ID]
    assert finding.severity == "info" and set(finding.layers) == {"8", "9", "10", "11"}
    assert abs(finding.numbers["last"] - sum(s / (1 + s) for s in (0.8, 0.9, 1.0, 1.1)) / 4) < 0.02
    assert abs(finding.numbers["first"] - sum(s / (1 + s) for s in (0, 0.1, 0.2, 0.3)) / 4) < 0.02


def test_is_silent_where_statistics_fit_or_are_off_alike() -> None:
    x = torch.randn(256, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    assert ID not in health.diagnose(deep(0.0), batches(x), select=[ID])
    network = trained_on(normalised(photos(256)), layers=9)
    assert ID not in health.diagnose(network, batches(normalised(photos(128, seed=1))), select=[ID])
