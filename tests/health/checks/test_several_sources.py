"""Two sources with the variance 1 and means 0 and 2: together, the mean is 1 and the variance 2."""

import math

import pytest
import torch
from torch import Tensor, nn

from bnlab.health import Report, diagnose

Batch = dict[str, Tensor]


def network() -> nn.Sequential:
    """Class 1 where the first value is above the running mean; the statistics are those of both sources."""
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2, bias=False)).eval()
    with torch.no_grad():
        model[0].running_mean.fill_(1.0)
        model[0].running_var.fill_(2.0)
        model[1].weight.zero_()
        model[1].weight[1, 0] = 1
    return model


def batches(
    apart: float = 2.0, n: int = 512, size: int = 32, channels: int = 8, seed: int = 0, sources: int = 2
) -> list[Batch]:
    """The class is whether the first value is above the mean of the source."""
    torch.manual_seed(seed)
    source = torch.randint(sources, (n,))
    x = torch.randn(n, 8)
    labels = (x[:, 0] > 0).long()
    x[:, :channels] += apart * source[:, None]
    parts = x.split(size), labels.split(size), source.split(size)
    return [{"input": a, "labels": b, "source": c} for a, b, c in zip(*parts, strict=True)]


def diagnosed(given: list[Batch], **options: object) -> Report:
    return diagnose(
        network(),
        given,
        forward=lambda model, batch: model(batch["input"]),
        sources=lambda batch: batch["source"],
        select=["BN023"],
        **options,  # type: ignore[arg-type]
    )


def test_finds_sources_and_what_statistics_of_each_gain() -> None:
    finding = diagnosed(batches())["BN023"]
    assert finding.severity == "warn"
    assert finding.layers == ("0",)
    assert finding.numbers["off_share"] == 1
    assert finding.numbers["mean_off"] == pytest.approx(1 / math.sqrt(2), rel=0.15)
    assert sum(finding.numbers["sources"].values()) == 512
    assert finding.cost is not None
    assert finding.cost.before == pytest.approx(0.66, abs=0.06)  # 34% are between the two means
    assert finding.cost.after > 0.95


def test_is_silent_on_sources_that_are_alike() -> None:
    assert "BN023" not in diagnosed(batches(apart=0.0))


def test_chance_is_not_reported() -> None:
    """The means of 16 to 32 images are off by more than 0.1 standard deviations in many channels."""
    reports = [diagnosed(batches(apart=0.0, n=96, sources=4, seed=seed)) for seed in range(6)]
    far = [(report.evidence.parts["sources"].distances["0"] > 0.1).mean() for report in reports]
    assert max(far) > 0.5
    assert not any("BN023" in report for report in reports)


@pytest.mark.parametrize(("channels", "found"), [(4, False), (5, True)])
def test_more_than_half_of_the_channels_have_to_differ(channels: int, found: bool) -> None:
    assert ("BN023" in diagnosed(batches(channels=channels))) == found


def test_is_advice_where_it_gains_nothing() -> None:
    model, given = network(), batches()
    for batch in given:
        batch["labels"] = model(batch["input"]).argmax(1)
    finding = diagnosed(given)["BN023"]
    assert finding.severity == "info"
    assert finding.cost is not None
    assert finding.cost.gain < 0


def test_without_labels_it_is_a_warning_without_a_cost() -> None:
    finding = diagnosed([{"input": b["input"], "source": b["source"]} for b in batches()])["BN023"]
    assert finding.severity == "warn"
    assert finding.cost is None


def test_without_sources_it_is_skipped() -> None:
    assert "sources=" in diagnose(network(), [torch.randn(32, 8)], select=["BN023"]).skipped["BN023"]
