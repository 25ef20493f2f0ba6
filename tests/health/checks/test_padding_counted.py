"""Sequences with the mean 1 and the variance 1; if half of the positions are zeros, the mean is 0.5."""

import pytest
import torch
from torch import Tensor, nn

from bnlab.health import Report, diagnose

Batch = dict[str, Tensor]


def batches(mean: float = 1.0, real: int = 10, *, noise: bool = False) -> list[Batch]:
    """Values, N x C x 20, and their lengths: `real` on average, or all 20. With noise, padding is like the rest."""
    torch.manual_seed(0)
    x = torch.randn(128, 6, 20) + mean
    lengths = (
        torch.randint(max(1, 2 * real - 20), min(20, 2 * real - 1) + 1, (128,)) if real < 20 else torch.full((128,), 20)
    )
    if not noise:
        x *= (torch.arange(20) < lengths[:, None])[:, None]
    return [{"input": a, "lengths": b} for a, b in zip(x.split(32), lengths.split(32), strict=True)]


def mask(batch: Batch) -> Tensor:
    return torch.arange(20) >= batch["lengths"][:, None]


def diagnosed(given: list[Batch]) -> Report:
    model = nn.Sequential(nn.BatchNorm1d(6)).eval()
    return diagnose(model, given, forward=lambda m, batch: m(batch["input"]), padding=mask, select=["BN025"])


def test_finds_padding_that_is_counted() -> None:
    finding = diagnosed(batches())["BN025"]
    assert finding.severity == "warn"
    assert finding.layers == ("0",)
    assert finding.numbers["padded_share"] == pytest.approx(0.5, abs=0.05)
    assert finding.numbers["off_share"] == 1
    assert finding.numbers["mean_off"] == pytest.approx(0.5, abs=0.1)


def test_the_variance_counts_too() -> None:
    """Of values with the mean 0, the zeros halve the variance."""
    finding = diagnosed(batches(mean=0.0))["BN025"]
    assert finding.numbers["variance_off"] == pytest.approx(2, abs=0.25)
    assert finding.numbers["mean_off"] < 0.1


def test_is_silent_without_padding() -> None:
    assert "BN025" not in diagnosed(batches(real=20))


def test_is_silent_on_padding_that_is_like_the_rest() -> None:
    assert "BN025" not in diagnosed(batches(noise=True))


def test_is_silent_on_little_padding() -> None:
    """Of 5% padding, the mean is off by 0.05 standard deviations."""
    report = diagnosed(batches(real=19))
    assert report.evidence.parts["padding"].share == pytest.approx(0.05, abs=0.02)
    assert "BN025" not in report


@pytest.mark.parametrize("seed", range(3))
def test_chance_in_few_sequences_is_not_reported(seed: int) -> None:
    """Each sequence has its own mean, so that those with much padding change the statistics by chance."""
    torch.manual_seed(seed)
    x = 0.05 * torch.randn(8, 6, 20) + torch.randn(8, 6, 1)
    lengths = torch.tensor([2, 2, 2, 2, 18, 18, 18, 18])
    report = diagnosed([{"input": x, "lengths": lengths}])
    layer = report.evidence.parts["padding"].layers["0"]
    far = abs(layer.mean - layer.mean_without) / layer.variance_without**0.5
    ratio = layer.variance / layer.variance_without
    assert ((far > 0.1) | (ratio > 1.25) | (ratio < 0.8)).mean() > 0.5
    assert layer.pairs == 8
    assert "BN025" not in report


def test_without_a_mask_it_is_skipped() -> None:
    report = diagnose(nn.Sequential(nn.BatchNorm1d(6)).eval(), [torch.randn(8, 6, 20)], select=["BN025"])
    assert "padding=" in report.skipped["BN025"]


def test_a_layer_that_takes_the_mask_is_not_measured_and_named() -> None:
    class MaskedNorm(nn.BatchNorm1d):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            rows = x.transpose(1, 2)
            out = torch.zeros_like(rows)
            out[mask] = super().forward(rows[mask])
            return out.transpose(1, 2)  # N x C x L

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = MaskedNorm(6)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.norm(x, mask)

    x, mask = torch.randn(16, 6, 20) + 3, torch.arange(20) < torch.arange(1, 17)[:, None]
    given = [{"x": x * mask[:, None], "mask": mask}] * 2
    report = diagnose(Net().eval(), given, padding=lambda batch: ~batch["mask"], select=["BN025"])
    assert "BN025" not in report
    assert any("more than one tensor, such as a mask: norm" in note for note in report.notes)
