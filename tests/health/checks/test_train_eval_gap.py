"""BN101."""

import torch
from torch import Tensor, nn

from bnlab.health import diagnose
from bnlab.norm import recalibrate


def network() -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    """Classes are told apart by channel 0, in batches of 64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2, bias=False)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-1.0, 0], [1, 0]]))
    y = torch.arange(512) % 2
    x = torch.stack([y * 2.0 + 5 + 0.2 * torch.randn(512), torch.randn(512)], 1)
    recalibrate(model, [*x.split(64)])
    return model, [*zip(x.split(64), y.split(64), strict=True)]


def test_finds_the_gap_and_names_recalibration() -> None:
    model, batches = network()
    model[0].running_mean.zero_()
    finding = diagnose(model, batches)["BN101"]
    assert finding.cost is not None
    assert (finding.cost.before, finding.cost.after) == (0.5, 1.0)
    assert finding.cause == "the running statistics do not fit: recalibrated ones give 100.0%"
    assert finding.safety == "safe"
    assert "norm.recalibrate" in finding.command


def test_is_silent_on_its_sound_twin() -> None:
    assert "BN101" not in diagnose(*network())


def test_is_silent_if_batches_are_sorted_by_class() -> None:
    model, batches = network()
    model[0].running_mean.zero_()
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    order = y.argsort(stable=True)
    report = diagnose(model, [*zip(x[order].split(64), y[order].split(64), strict=True)])
    assert "BN101" not in report
    assert report.evidence.sorted_by_class
