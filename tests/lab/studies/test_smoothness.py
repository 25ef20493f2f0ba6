import math
from pathlib import Path

import pytest
import torch
from torch import nn

from bnlab.lab.experiment import WITH_BN, WITHOUT_BN, Experiment
from bnlab.lab.measurements import JobContext
from bnlab.lab.records import Results, where
from bnlab.lab.replay import batch_at, loss_and_gradients, replaying
from bnlab.lab.studies import smoothness as study
from bnlab.lab.studies.smoothness import COMMON, EQUAL, LENGTHS, MULTIPLES, LossAlongGradient, along, conclude
from bnlab.lab.trained_network import Probe, train
from bnlab.lab.verdict import Verdict
from bnlab.training.build import TrainingContext
from tests.lab.studies.helpers import MakeExperiment, draw, unchanged

ROUGH = {"range": 3.0, "change": 2.0, "beta": 5.0, "relative": 1.0}
SMOOTH = {name: value / 10 for name, value in ROUGH.items()}


def planted(
    with_bn: dict[str, float], without: dict[str, float], *, scatter: float = 1.0, top1: float = 0.5
) -> Results:
    smoothness, accuracy = [], []
    for arm, measures in ((WITHOUT_BN, without), (WITH_BN, with_bn)):
        for seed in range(3):
            times = scatter ** (seed - 1) if arm == WITH_BN else 1.0
            label = {"arm": arm, "learning_rate": EQUAL, "chosen": 1, "seed": seed}
            for step in (5, 10, 15):
                for lengths in LENGTHS:
                    there = {name: value * times for name, value in measures.items()}
                    smoothness.append(label | {"step": step, "lengths": lengths} | there)
            accuracy.append(label | {"step": 10, "test_top1": top1, "guess": 0.1, "n_test": 500, "diverged_at": None})
    return {"smoothness": smoothness, "accuracy": accuracy}


def test_it_holds_where_all_three_are_smaller_with_bn() -> None:
    assert conclude(planted(SMOOTH, ROUGH)).verdict is Verdict.HOLDS


@pytest.mark.parametrize("measure", ["range", "change", "beta"])
def test_it_does_not_where_one_is_larger(measure: str) -> None:
    assert conclude(planted(SMOOTH | {measure: 10 * ROUGH[measure]}, ROUGH)).verdict is Verdict.DOES_NOT_HOLD


def test_it_is_not_shown_where_seeds_disagree() -> None:
    assert conclude(planted(SMOOTH, ROUGH, scatter=50)).verdict is Verdict.NOT_SHOWN


def test_networks_that_guess_show_nothing() -> None:
    conclusion = conclude(planted(SMOOTH, ROUGH, top1=0.12))
    assert conclusion.verdict is Verdict.NOT_SHOWN
    assert len([remark for remark in conclusion.remarks if "did no better than guess in 3 of 3 seeds" in remark]) == 2


def test_one_step_with_infinite_losses_does_not_decide() -> None:
    results = planted(SMOOTH, ROUGH)
    for row in where(results["smoothness"], step=10):
        row.update(dict.fromkeys(ROUGH, math.inf))
    conclusion = conclude(results)
    assert conclusion.verdict is Verdict.HOLDS
    for plot in conclusion.plots.values():
        assert all(math.isfinite(value) for series in plot.series for value in series.high)


class Compared(Probe):
    """Compares `along` with the losses and gradients at weights that are set one by one."""

    def before(self, step: int, context: TrainingContext) -> None:
        network, batch = context.network, batch_at(step, context)
        parameters = list(network.parameters())
        lengths = [0.1, 0.4]
        start = [p.detach().clone() for p in parameters]
        with replaying(context):
            row = along(context, batch, step, lengths)
            assert row is not None
            assert all(torch.equal(p, kept) for p, kept in zip(parameters, start, strict=True))
            loss, first = loss_and_gradients(context, batch, parameters, step)
            losses, turned = [loss], []
            for length in lengths:
                moved = [kept - length * g for kept, g in zip(start, first, strict=True)]
                nn.utils.vector_to_parameters(torch.cat([each.flatten() for each in moved]), parameters)
                loss, gradient = loss_and_gradients(context, batch, parameters, step)
                losses.append(loss)
                turned.append(flat(gradient) - flat(first))
        size, changes = float(flat(first).norm()), [float(each.norm()) for each in turned]
        assert row["loss"] == losses[0]
        assert row["gradient"] == pytest.approx(size)
        assert row["range"] == pytest.approx(max(losses) - min(losses))
        assert row["change"] == pytest.approx(max(changes))
        assert row["relative"] == pytest.approx(max(changes) / size)
        betas = [change / (length * size) for change, length in zip(changes, lengths, strict=True)]
        assert row["beta"] == pytest.approx(max(betas))
        with replaying(context):
            far = along(context, batch, step, [0.1, 1e38])
            assert far is not None
            assert far["range"] == far["change"] == far["beta"] == math.inf
            parameters[0].data.fill_(math.nan)
            assert along(context, batch, step, lengths) is None
        self.write("compared", {"step": step})


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors])


def place_of(experiment: Experiment, folder: Path) -> JobContext:
    return JobContext(split=experiment.splits.for_seed(0), folder=folder, device="cpu", seed=0)


def test_along_the_gradient_step_by_step(make_experiment: MakeExperiment, tmp_path: Path) -> None:
    experiment = make_experiment(steps=2, learning_rate=0.1)
    trained = train(
        place_of(experiment, tmp_path), experiment.recipe("mlp", size=28, activation="relu"), probe=Compared()
    )
    assert len(trained.results["compared"]) == 2


class Careful(LossAlongGradient):
    """Checks that the probe leaves everything unchanged."""

    probe_steps = 3

    def before(self, step: int, context: TrainingContext) -> None:
        with unchanged(context.network):
            super().before(step, context)


def test_a_probe_changes_nothing_and_has_both_lengths(make_experiment: MakeExperiment, tmp_path: Path) -> None:
    experiment = make_experiment(learning_rate=0.07, schedule="constant")
    recipe = experiment.recipe("bn_mlp", size=16)
    probed = train(place_of(experiment, tmp_path), recipe, probe=Careful())
    rows = probed.results["smoothness"]
    assert [(row["step"], row["lengths"]) for row in rows] == [(s, each) for s in (1, 3, 5) for each in LENGTHS]
    assert [row["rate"] for row in rows] == [COMMON, 0.07] * 3
    common, own = rows[:2]
    assert common["gradient"] == own["gradient"]
    assert common["range"] != own["range"]
    plain = train(place_of(experiment, tmp_path), recipe)
    for ours, theirs in zip(probed.context.network.parameters(), plain.context.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.usefixtures("mlps")
def test_from_photos_to_plots(make_experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "RATES", (0.003, 0.01))
    monkeypatch.setattr(study, "MULTIPLES", MULTIPLES[::3])
    results = study.measure(make_experiment(steps=2))
    assert len(results["smoothness"]) == 2 * 2 * 2 * 2 * len(LENGTHS)
    conclusion = conclude(results)
    assert len(conclusion.plots) == 6
    draw(conclusion)
