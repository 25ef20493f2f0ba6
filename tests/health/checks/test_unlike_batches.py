"""Images with the variance 1, of which whole batches are moved: by class, by site or slowly."""

import pytest
import torch
from torch import Tensor, nn

from bnlab.health import diagnose


def network(channels: int = 6, classes: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(channels), nn.Linear(channels, classes)).eval()


def independent(batches: int, size: int = 16, channels: int = 6, seed: int = 1) -> Tensor:
    """Batches x N x C."""
    return torch.randn(batches, size, channels, generator=torch.Generator().manual_seed(seed))


def test_finds_batches_of_one_site_each() -> None:
    """Images vary by 1 and sites by 1: the batch means by 1 + 1 / 16, which is 17 times as much as without sites."""
    x = independent(40) + independent(40, size=1, seed=2)
    finding = diagnose(network(), [*x], select=["BN105"])["BN105"]
    assert finding.layers == ("0",)
    assert finding.numbers["ratio"] == pytest.approx(17, rel=0.35)
    assert abs(finding.numbers["correlation"]) < 0.4
    assert "site" in finding.cause


def test_finds_slow_drift() -> None:
    """By 0.1 a batch: the means of 40 batches vary by 1.37 + 1 / 16, successive ones by half of 0.01 + 2 / 16."""
    x = independent(40) + 0.1 * torch.arange(40.0)[:, None, None]
    finding = diagnose(network(), [*x], select=["BN105"])["BN105"]
    assert finding.numbers["ratio"] == pytest.approx(16 * (0.01 * 40 * 41 / 12 + 1 / 16), rel=0.1)
    assert finding.numbers["correlation"] == pytest.approx(
        1 - (0.005 + 1 / 16) / (0.01 * 40 * 41 / 12 + 1 / 16), abs=0.02
    )
    assert "order" in finding.cause


def test_finds_batches_sorted_by_class() -> None:
    x = independent(8)
    labels = torch.arange(8 * 16).reshape(8, 16) // 32  # each class fills two batches
    report = diagnose(network(), [*zip(x, labels, strict=True)], select=["BN105"])
    finding = report["BN105"]
    assert finding.severity == "warn"
    assert finding.numbers["classes"] == 1
    assert finding.numbers["classes_if_shuffled"] == pytest.approx(4, abs=0.1)
    assert finding.cause == "the batches are sorted by class"
    assert finding.layers == ()  # the classes' images are alike, so that no layer's means differ


def test_sorted_classes_whose_images_differ_name_the_layers_too() -> None:
    labels = torch.arange(8 * 16).reshape(8, 16) // 32
    x = independent(8) + 2 * labels[:, :, None]
    finding = diagnose(network(), [*zip(x, labels, strict=True)], select=["BN105"])["BN105"]
    assert finding.layers == ("0",)
    assert finding.cause == "the batches are sorted by class"


@pytest.mark.parametrize("seed", range(5))
def test_is_silent_on_shuffled_batches(seed: int) -> None:
    x = independent(40, seed=seed) + independent(40, size=1, seed=seed + 10)
    labels = torch.arange(40 * 16) // 160
    order = torch.randperm(640, generator=torch.Generator().manual_seed(seed))
    shuffled = x.flatten(0, 1)[order].split(16), labels[order].split(16)
    assert "BN105" not in diagnose(network(), [*zip(*shuffled, strict=True)], select=["BN105"])


@pytest.mark.parametrize(("size", "found"), [(0.2, False), (0.3, True)])
def test_a_small_difference_is_not_reported(size: float, found: bool) -> None:
    """Sites of 0.2 raise the variance of 200 batch means by a factor of 1.64, far from chance; of 0.3, by 2.44."""
    x = independent(200) + size * independent(200, size=1, seed=2)
    report = diagnose(network(), [*x], images=None, select=["BN105"])
    assert _ratio(report.evidence.layers["0"].evaluation) == pytest.approx(1 + 16 * size**2, rel=0.3)
    assert ("BN105" in report) == found


def test_chance_in_few_channels_is_not_reported() -> None:
    """The factor is above 2 in the median channel of small layers now and then, but not significantly."""
    reports = [diagnose(network(1), [*independent(4, channels=1, seed=s)], select=["BN105"]) for s in range(20)]
    ratios = [_ratio(report.evidence.layers["0"].evaluation) for report in reports]
    assert max(ratios) > 2
    assert not any("BN105" in report for report in reports)


def _ratio(sample: object) -> float:
    return float(16 * (sample.between / sample.between_images).mean())  # type: ignore[attr-defined]


def test_constant_channels_are_left_out() -> None:
    """Their means differ between batches by rounding alone."""
    x = independent(8) * torch.tensor([1.0] + 5 * [0.0])
    x[:, :, 1:] += 1e-4 * torch.arange(8.0)[:, None, None]
    assert "BN105" not in diagnose(network(), [*x], select=["BN105"])
