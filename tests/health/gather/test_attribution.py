"""Attribution of a gap: planted causes, alone and together, and a rest that nothing explains."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnlab import health
from bnlab.health import Report
from bnlab.health.attribution import Explained
from bnlab.health.compare import Comparison
from tests.health.checks.networks import sound_network, teacher_batches
from tests.health.checks.photos import batches, normalised, photos, trained_on, with_teacher

Batch = tuple[Tensor, Tensor]


def explained(report: Report) -> dict[str, Explained]:
    assert report.attribution is not None
    return {cause.cause: cause for cause in report.attribution.causes}


def stale() -> tuple[nn.Sequential, list[Batch]]:
    model = sound_network()
    given = teacher_batches(model, batches=8, size=32)
    model[1].running_mean.add_(2)
    return model, given


class Counted(list[Any]):
    """Batches that count how often they are read."""

    passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return super().__iter__()


def test_without_a_gap_there_is_no_attribution() -> None:
    model = sound_network()
    assert health.diagnose(model, teacher_batches(model, batches=8, size=32)).attribution is None


def test_scores_of_the_other_passes_are_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = stale()
    counted = Counted(given)
    report = health.diagnose(model, counted)
    assert report.attribution is not None
    assert not any("to attribute" in note for note in report.notes)
    passes, counted.passes = counted.passes, 0
    monkeypatch.setattr(sys.modules["bnlab.health.diagnose"], "attribute", lambda *_: None)
    health.diagnose(model, counted)
    assert counted.passes == passes
    reference = [x for x, _ in given]
    monkeypatch.undo()
    notes = health.diagnose(model, counted, reference=reference).notes
    assert any("the images were run 1 more time" in note for note in notes)


def test_stale_statistics_are_attributed_fully() -> None:
    report = health.diagnose(*stale())
    (cause,) = explained(report).values()
    assert report.attribution is not None
    assert (cause.cause, cause.check) == ("stale statistics", "BN102")
    assert cause.alone.before == report.accuracy["running"] == report.attribution.gap.before
    assert cause.alone.after == report.accuracy["recalibrated"] == report.attribution.together.after  # type: ignore[union-attr]
    assert cause.without is not None
    assert cause.without.gain == pytest.approx(-cause.alone.gain)
    assert report.attribution.unexplained == 0  # batches of 32 are worse than the population
    assert report.attribution.gap.gain > 0.2


def test_with_training_images_their_statistics_are_tried() -> None:
    model, given = stale()
    reference = [x for x, _ in teacher_batches(model, batches=8, size=32, seed=9)]
    report = health.diagnose(model, given, reference=reference)
    cause = explained(report)["stale statistics"]
    assert cause.alone.gain > 0.2
    assert report.attribution.unexplained == 0  # type: ignore[union-attr]


def test_wrong_preprocessing_is_attributed_fully() -> None:
    network = trained_on(normalised(photos(256)))
    pixels = photos(256, seed=1)
    labelled = with_teacher(network, normalised(pixels))
    wrong = [(x, y) for x, (_, y) in zip(pixels.split(32), labelled, strict=True)]
    report = health.diagnose(network, wrong)
    cause = explained(report)["preprocessing"]
    assert cause.alone.after > 0.98
    assert report.attribution.together is not None  # type: ignore[union-attr]
    assert report.attribution.unexplained == 0  # type: ignore[union-attr]


def test_another_domain_is_attributed_fully() -> None:
    network = trained_on(normalised(photos(256)))
    labels = [y for _, y in with_teacher(network, normalised(photos(256, seed=1)))]
    camera = normalised(0.55 * photos(256, seed=1) + torch.tensor([0.35, 0.3, 0.1]).view(3, 1, 1))
    shifted = list(zip(camera.split(32), labels, strict=True))
    report = health.diagnose(network, shifted, reference=batches(normalised(photos(256, seed=2))))
    found = explained(report)
    assert found["domain"].alone.after == report.accuracy["recalibrated"]
    assert found["domain"].alone.gain > 0.1
    assert report.attribution.unexplained == 0  # type: ignore[union-attr]


def test_of_two_repairs_of_the_statistics_those_of_the_images_themselves_count() -> None:
    """Statistics that are stale, of a network whose images come from another camera."""
    network = trained_on(normalised(photos(256)))
    labels = [y for _, y in with_teacher(network, normalised(photos(256, seed=1)))]
    camera = normalised(0.55 * photos(256, seed=1) + torch.tensor([0.35, 0.3, 0.1]).view(3, 1, 1))
    shifted = list(zip(camera.split(32), labels, strict=True))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.mul_(25)  # type: ignore[union-attr]
    report = health.diagnose(network, shifted, reference=batches(normalised(photos(256, seed=2))))
    found = explained(report)
    assert [*found] == ["domain", "stale statistics"]
    assert found["domain"].alone.after != found["stale statistics"].alone.after
    assert report.attribution.together.after == report.accuracy["recalibrated"]  # type: ignore[union-attr]


def test_a_mode_is_attributed_and_nothing_moves() -> None:
    """Dropout in training mode while the model is in evaluation."""
    torch.manual_seed(0)
    model = sound_network(dropout=0.9)
    given = teacher_batches(model, batches=8, size=32)
    model[8].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = health.diagnose(model, given)
    (cause,) = explained(report).values()
    assert (cause.cause, cause.check, cause.alone.after) == ("mode", "BN002", 1.0)
    assert report.attribution.gap.before == cause.alone.before < 0.9  # type: ignore[union-attr]
    assert model[8].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_two_causes_add_up() -> None:
    model, given = stale()
    model[8] = nn.Dropout(0.9)
    report = health.diagnose(model.eval(), given)
    assert [*explained(report)] == ["stale statistics"]
    model[8].train()
    report = health.diagnose(model, given)
    found = explained(report)
    assert [*found] == ["mode", "stale statistics"]
    together = report.attribution.together  # type: ignore[union-attr]
    assert together is not None
    assert together.after == report.accuracy["recalibrated"] > max(cause.alone.after for cause in found.values())
    for cause in found.values():
        assert cause.without is not None
        assert cause.without.before == together.after
        assert cause.without.gain < -0.2
    assert not found["mode"].alone.matters  # by itself it wins nothing where the statistics are wrong


def test_what_no_cause_explains_is_said() -> None:
    """A fault that batch statistics hide, and no check of a cause finds."""
    model, given = stale()
    report = health.diagnose(model, given, select=["BN101"])
    assert report.attribution is not None
    assert (report.attribution.causes, report.attribution.together) == ((), None)
    assert report.attribution.unexplained == pytest.approx(100 * report.attribution.gap.gain)


def test_a_rest_remains_where_a_repair_does_not_suffice() -> None:
    """The reference images are unlike those of the diagnosis: their statistics win a part back."""
    model, given = stale()
    torch.manual_seed(0)
    reference = [torch.randn(32, 3, 8, 8) * 1.3 + 0.4 for _ in range(8)]
    report = health.diagnose(model, given, reference=reference, select=["BN101", "BN102"])
    (cause,) = explained(report).values()
    assert cause.alone.gain > 0
    assert report.attribution.unexplained > 1  # type: ignore[union-attr]
    rest = 100 * (report.attribution.gap.gain - cause.alone.gain)  # type: ignore[union-attr]
    assert report.attribution.unexplained == pytest.approx(rest)  # type: ignore[union-attr]


def test_batches_sorted_by_class_have_no_attribution() -> None:
    model, given = stale()
    x, y = (torch.cat(part) for part in zip(*given, strict=True))
    order = y.argsort()
    report = health.diagnose(model, [*zip(x[order].split(32), y[order].split(32), strict=True)])
    assert report.evidence.sorted_by_class
    assert report.attribution is None


def test_a_failure_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    from bnlab.health.gather import attribution

    def fail(*_: object) -> Comparison:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(attribution._Ways, "scores", fail)
    report = health.diagnose(*stale())
    assert report.attribution is None
    assert any("what explains the gap was not measured (RuntimeError" in note for note in report.notes)
