"""BN102."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bnlab.health import diagnose
from bnlab.health.compare import Comparison
from bnlab.health.evidence import Evidence, LayerEvidence, Scores
from bnlab.health.registry import find_check
from bnlab.norm import recalibrate


def network(seed: int = 0) -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    """A network with the statistics of its images, which it classifies correctly."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()  # fmt: skip
    x = 3 * torch.randn(256, 3, 10, 10) + 6 * torch.randn(256, 3, 1, 1)
    recalibrate(model, [*x.split(32)])
    return model, [*zip(x.split(32), model(x).argmax(1).split(32), strict=True)]


def test_finds_statistics_of_100_steps_at_momentum_0_001() -> None:
    """They still weigh the initial mean 0 and variance 1 by 0.999^100 = 90%."""
    model, batches = network()
    norm = model[1]
    norm.momentum = 0.001
    norm.num_batches_tracked.fill_(100)
    weight = 0.999**100
    norm.running_mean.mul_(1 - weight)
    norm.running_var.mul_(1 - weight).add_(weight)
    finding = diagnose(model, batches)["BN102"]
    assert finding.layers == ("1",)
    assert finding.numbers["off_share"] > 0.9
    assert finding.numbers["initial_weight"] == pytest.approx(weight, abs=0.01)
    assert "momentum 0.001 is small for 100 batches" in finding.cause
    assert finding.cost is not None
    assert finding.cost.after == 1.0
    assert finding.cost.matters


@pytest.mark.parametrize("seed", range(4))
def test_is_silent_on_recalibrated_statistics(seed: int) -> None:
    assert "BN102" not in diagnose(*network(seed))


def test_is_silent_on_a_moving_average_that_is_noisy_by_chance() -> None:
    """50 batches of 8 at momentum 0.1: channels are off by more than 0.1 standard deviations, but as chance has it."""
    model, batches = network()
    x = torch.cat([x for x, _ in batches])
    model.train()
    for i in range(50):
        model(x[torch.randperm(256, generator=torch.Generator().manual_seed(i))[:8]])
    model.eval()
    assert "BN102" not in diagnose(model, [(x, model(x).argmax(1)) for x, _ in batches])


def test_without_labels_half_of_the_channels_must_be_off() -> None:
    model, batches = network()
    images = [x for x, _ in batches]
    model[1].running_mean[:4] += 20
    assert "BN102" not in diagnose(model, images)
    model[1].running_mean[4] += 20
    finding = diagnose(model, images)["BN102"]
    assert finding.cost is None
    assert finding.numbers["off_share"] == 5 / 8


def test_is_silent_about_statistics_that_are_not_finite() -> None:
    model, batches = network()
    model[1].running_var[4] = float("nan")
    report = diagnose(model, batches)
    assert "BN008" in report
    assert "BN102" not in report


def monitored(off_share: float, *, before: float = 0.8, after: float = 0.9) -> list[Any]:
    """The findings of what a training's monitor measures."""
    layer = LayerEvidence(
        name="bn", kind="", family="batch", channels=8, eps=1e-5, momentum=1e-4, updates=100,
        off_share=off_share, mean_off=0.5, variance_off=2.0,
    )  # fmt: skip
    right = np.arange(1000) / 1000
    scores = Scores(running=(right < before).astype(float), population=(right < after).astype(float))
    evidence = Evidence(layers={"bn": layer}, images=1000, scores=scores)
    return find_check("BN102").run(evidence)


def test_what_a_training_measures_is_judged_by_the_share_alone() -> None:
    (finding,) = monitored(0.6)
    assert finding.cost == Comparison.measure([1] * 800 + [0] * 200, [1] * 900 + [0] * 100)
    assert "initial statistics still weigh 99%" in finding.cause
    assert monitored(0.5) == []
    assert monitored(0.6, after=0.805) == []
