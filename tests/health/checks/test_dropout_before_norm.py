import pytest
import torch
from torch import nn

from bnlab import health, norm

ID = "BN108"


def network(p: float, *, trained: bool) -> nn.Sequential:
    """Dropout of values with mean 0 and variance 1 gives the variance 1 / (1 - p)."""
    model = nn.Sequential(nn.Dropout(p), nn.BatchNorm1d(16, momentum=None), nn.Linear(16, 3))
    if trained:
        model.train()
        for batch in images(512, 1).split(64):
            model(batch)
    else:
        norm.recalibrate(model, list(images(512, 1).split(64)))
    return model.eval()


def images(n: int, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(n, 16)


def test_finds_the_variance_that_dropout_adds() -> None:
    report = health.diagnose(network(0.5, trained=True), list(images(256, 2).split(32)), select=[ID])
    finding = report[ID]
    assert finding.severity == "warn" and finding.layers == ("1",)
    assert finding.numbers["ratios"]["1"] == pytest.approx(2, rel=0.15)
    assert finding.numbers["in_running_statistics"] == ["1"]


def test_recalibrated_statistics_are_no_fault_of_evaluation() -> None:
    report = health.diagnose(network(0.5, trained=False), list(images(256, 2).split(32)), select=[ID])
    assert report[ID].severity == "info"


@pytest.mark.parametrize("p", [0.0, 0.02])
def test_is_silent_about_little_dropout(p: float) -> None:
    """1 / (1 - 0.02) is below 1.1."""
    assert not health.diagnose(network(p, trained=True), list(images(256, 2).split(32)), select=[ID]).findings


def test_is_silent_about_dropout_after_the_last_layer() -> None:
    model = nn.Sequential(nn.BatchNorm1d(16, momentum=None), nn.Dropout(0.5), nn.Linear(16, 3))
    norm.recalibrate(model, list(images(512, 1).split(64)))
    report = health.diagnose(model.eval(), list(images(256, 2).split(32)), select=[ID])
    assert not report.findings and ID not in report.skipped
