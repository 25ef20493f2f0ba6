"""Repairing a copy: scores before and after, what is kept, and bad input."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from bnlab import health, norm
from bnlab.errors import DataError, UsageError
from bnlab.health import repairs
from bnlab.health.repair import asked_for, score
from tests.health.checks.networks import sound_network, teacher_batches

Batch = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def stale() -> tuple[nn.Sequential, list[Batch]]:
    """A network with statistics that lag, and images that it classifies correctly with the right ones."""
    model = sound_network()
    given = teacher_batches(model, batches=8, size=32)
    model[1].running_mean.add_(2)
    return model, given


def accuracy(model: nn.Module, batches: list[Batch]) -> float:
    with torch.no_grad():
        return float(torch.cat([(model(x).argmax(1) == y).double() for x, y in batches]).mean())


def test_recalibration_wins_the_points_back(stale: tuple[nn.Sequential, list[Batch]]) -> None:
    model, batches = stale
    before = copy.deepcopy(model.state_dict())
    repaired = health.repair(model, batches, [repairs.recalibrate()])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    (applied,) = repaired.applied
    assert applied.layers == ("1", "4")
    assert applied.comparison == repaired.comparison
    assert repaired.comparison is not None
    assert repaired.comparison.before == accuracy(model, batches) < 0.8
    assert repaired.comparison.after == accuracy(repaired.model, batches) > 0.95
    assert repaired.comparison.p_value < 1e-6
    assert (repaired.images, repaired.same_images) == (256, True)
    assert "recalibrate (safe) changed 2 layers" in str(repaired).lower()
    assert "measured on the images that were scored" in str(repaired)
    assert json.loads(json.dumps(repaired.to_json()))["repairs"][0]["kept"] is True


def test_repairs_follow_each_other(stale: tuple[nn.Sequential, list[Batch]]) -> None:
    model, batches = stale
    repaired = health.repair(model, batches, [repairs.recalibrate(), repairs.freeze(), repairs.recalibrate()])
    first, second, third = repaired.applied
    assert first.comparison is not None
    assert second.comparison is not None
    assert second.comparison.before == first.comparison.after == second.comparison.after
    assert third.layers == ()
    assert third.skipped == {"1": "it is frozen", "4": "it is frozen"}
    assert "All together: accuracy was" in str(repaired)
    assert all(one.kept for one in repaired.applied)


def test_statistics_come_from_the_calibration(stale: tuple[nn.Sequential, list[Batch]]) -> None:
    model, batches = stale
    torch.manual_seed(7)
    others = [torch.randn(32, 3, 8, 8) for _ in range(4)]
    expected = copy.deepcopy(model)
    norm.recalibrate(expected, others)
    repaired = health.repair(model, batches, [repairs.recalibrate()], calibration=others)
    assert not repaired.same_images
    assert torch.equal(repaired.model[4].running_var, expected[4].running_var)  # type: ignore[index,union-attr,arg-type]


def test_findings_ask_for_the_safe_repairs_that_help(stale: tuple[nn.Sequential, list[Batch]]) -> None:
    model, batches = stale
    report = health.diagnose(model, batches)
    assert "BN102" in report
    repaired = health.repair(model, batches, report.findings)
    assert [(one.name, one.kept) for one in repaired.applied] == [("recalibrate", True)]


def test_a_repair_that_does_not_help_is_named_and_not_kept(stale: tuple[nn.Sequential, list[Batch]]) -> None:
    model, batches = stale
    findings = health.diagnose(model, batches).findings
    sound = sound_network()
    repaired = health.repair(sound, batches, findings)
    (applied,) = repaired.applied
    assert (applied.kept, applied.reason) == (False, "it does not help")
    assert torch.equal(repaired.model[1].running_mean, sound[1].running_mean)  # type: ignore[index,union-attr,arg-type]
    assert "It was not kept, since it does not help." in str(repaired)
    without = health.repair(model, [x for x, _ in batches], findings)
    assert (without.applied[0].kept, without.comparison) == (False, None)
    assert "without labels" in without.applied[0].reason


def test_exact_repairs_are_kept_without_a_gain() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    norm.recalibrate(model, [torch.randn(64, 3, 8, 8)])
    batches = teacher_batches(model, batches=4)
    repaired = health.repair(model, batches, health.diagnose(model, batches).findings)
    assert [(one.name, one.kept) for one in repaired.applied] == [("drop_bias", True)]
    assert not repaired.model[0].bias.any()  # type: ignore[index,union-attr,operator]


def test_findings_that_are_not_safe_ask_for_nothing(stale: tuple[nn.Sequential, list[Batch]]) -> None:
    from dataclasses import replace

    finding = health.diagnose(*stale)["BN102"]
    assert [one.name for one in asked_for([finding, finding])] == ["recalibrate"]
    assert asked_for([replace(finding, safety="unsafe")]) == []
    assert str(health.repair(*stale, [])) == "Nothing was to be repaired."


def test_outdated_statistics_are_repaired() -> None:
    """bnlab's layers refuse them in inference, but before and after can be compared."""
    model = nn.Sequential(norm.BatchNorm2d(3, statistics="population"), nn.Flatten(), nn.Linear(48, 3))
    model(torch.randn(8, 3, 4, 4))
    model.eval()
    batches = [(torch.randn(8, 3, 4, 4), torch.zeros(8, dtype=torch.long))]
    assert health.repair(model, batches, [repairs.recalibrate()]).comparison is not None


def test_wrapped_models_and_metrics(stale: tuple[nn.Sequential, list[Batch]]) -> None:
    model, batches = stale

    def metric(output: torch.Tensor, batch: Batch) -> torch.Tensor:
        return -nn.functional.cross_entropy(output, batch[1], reduction="none")

    repaired = health.repair(nn.DataParallel(model), batches, [repairs.recalibrate()], metric=metric)
    assert isinstance(repaired.model, nn.Sequential)
    assert repaired.comparison is not None
    assert not repaired.comparison.is_accuracy
    assert "The metric was" in str(repaired)


def test_modes_are_kept_and_scores_are_those_of_evaluation(stale: tuple[nn.Sequential, list[Batch]]) -> None:
    model, batches = stale
    repaired = health.repair(model.train(), batches, [repairs.set_eps(1e-4)])
    assert repaired.model.training
    assert repaired.comparison is not None
    assert repaired.comparison.before == accuracy(model.eval(), batches)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda m, b: (m, b, ["recalibrate"]), TypeError, "health.repairs"),
        (lambda m, b: ("model", b, []), TypeError, "nn.Module"),
        (lambda m, b: (m, [], [repairs.recalibrate()]), DataError, "no image"),
        (lambda m, b: (m, [torch.randn(4, 5, 8, 8)], [repairs.recalibrate()]), UsageError, "cannot be run"),
        (lambda m, b: (m, [(b[0][0] * torch.nan, b[0][1])], [repairs.recalibrate()]), UsageError, "not finite reach 1"),
        (lambda m, b: (m, b, [repairs.merge_ranks([m.state_dict()])]), UsageError, "two or more"),
    ],
    ids=["words", "no module", "no images", "channels", "not finite", "one rank"],
)
def test_bad_input(change: Any, error: type[Exception], text: str) -> None:
    model = sound_network()
    with pytest.raises(error, match=text):
        health.repair(*change(model, teacher_batches(model)))


def test_a_score_needs_labels() -> None:
    from bnlab.health.batches import Batches

    model = sound_network()
    batches = teacher_batches(model)
    cpu = torch.device("cpu")
    assert score(model, Batches([x for x, _ in batches], cpu)) is None
    assert score(model, Batches(batches, cpu)).tolist() == [1.0] * 32  # type: ignore[union-attr]


def test_a_bias_that_something_else_reads_is_not_dropped() -> None:
    class ReadsBias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.linear(x)) + self.linear.bias  # N x 3

    torch.manual_seed(0)
    model = ReadsBias().eval()
    repaired = health.repair(model, [torch.randn(16, 3)] * 2, [repairs.drop_bias()])
    (one,) = repaired.applied
    assert not one.kept and "changes the outputs" in one.reason
    assert torch.equal(repaired.model.linear.bias, model.linear.bias)


def test_generators_are_restored(stale: tuple[nn.Sequential, list[Batch]]) -> None:
    model, batches = stale
    images = torch.cat([x for x, _ in batches])
    own = torch.Generator().manual_seed(5)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, torch.zeros(len(images), dtype=torch.long)), 16, True, generator=own
    )
    before = own.get_state(), torch.get_rng_state()
    health.repair(model, loader, [repairs.recalibrate()])
    assert torch.equal(before[0], own.get_state()) and torch.equal(before[1], torch.get_rng_state())


def test_calibration_that_the_model_cannot_take_is_refused(stale: tuple[nn.Sequential, list[Batch]]) -> None:
    model, batches = stale
    with pytest.raises(UsageError, match="recalibrate: "):
        health.repair(model, batches, [repairs.recalibrate()], calibration=[torch.randn(4, 1, 8, 8)])
