"""More epochs for a run: what goes on, what is refused, and that its bits are those of a training as long at once."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

import bnlab
from bnlab.classifier.file import read_classifier
from bnlab.config import load_settings
from bnlab.errors import RunError, UsageError
from bnlab.files import read_csv
from bnlab.progress import NullProgress
from bnlab.recipe import Recipe
from bnlab.runs import Run
from bnlab.training import run as training_run
from bnlab.training.extend import extend
from bnlab.training.schedule import Plan
from bnlab.training.state import TrainState, out_of_patience

MLP: dict[str, Any] = {
    "network": "bn_mlp", "size": 32, "batch_size": 8, "learning_rate": 0.02, "workers": 0, "schedule": "constant",
    "start_size": 1.0, "validate_every": 1, "recalibration_images": 0, "bn_monitor": False, "ema": 0.5,
}  # fmt: skip
RUN = Run(Path("runs/a"))


def trained(data: Path, name: str, **changes: Any) -> Run:
    settings = load_settings("default", MLP | changes)
    training_run.train(data, settings, root=Path("runs"), name=name, strict=False, progress=NullProgress())
    return Run(Path("runs") / name)


def weights(file: Path) -> list[bytes]:
    tensors, _ = read_classifier(file)
    return [tensors[name].numpy().tobytes() for name in sorted(tensors)]


def metrics(run: Run) -> list[dict[str, str]]:
    clock = ("seconds", "images_per_second", "recalibration_seconds")
    return [{key: value for key, value in row.items() if key not in clock} for row in read_csv(run.metrics)]


class Killed(BaseException):
    pass


def test_a_longer_training_has_the_bits_of_one_that_was_as_long_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it is killed when recipe.yaml has the new number and state.pt the old one."""
    monkeypatch.chdir(tmp_path)
    whole, run = trained(data, "whole", epochs=3), trained(data, "a", epochs=1)
    lines = run.recipe.read_text().splitlines()
    real, writes = Path.replace, itertools.count(1)

    def dying(self: Path, target: Path) -> Path:
        if next(writes) == 2:
            raise Killed
        return real(self, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "replace", dying)
        bnlab.resume("a", epochs=3)
    now = run.recipe.read_text().splitlines()
    assert [(a, b.partition(" Number")[0]) for a, b in zip(lines, now, strict=True) if a != b] == [
        (lines[now.index(next(line for line in now if line.startswith("epochs")))],
         "epochs: 3  # (yours, on a resume after 1 epoch)")
    ]  # fmt: skip
    result = bnlab.resume("a")
    assert (result.epochs, len(result.rows)) == (3, 3)
    assert weights(run.last) == weights(whole.last)
    assert weights(run.best) == weights(whole.best)
    assert metrics(run) == metrics(whole)
    assert read_classifier(run.last)[1].recipe == read_classifier(whole.last)[1].recipe
    before = {path: path.read_bytes() for path in run.folder.iterdir() if path.is_file()}
    for number in (2, 3):
        with pytest.raises(RunError, match=r"runs/a has trained 3 epochs already: pass a larger number"):
            bnlab.resume("a", epochs=number)
    with pytest.raises(UsageError, match="cannot change 'batch_size': leave batch_size out"):
        bnlab.resume("a", batch_size=4)
    assert before == {path: path.read_bytes() for path in run.folder.iterdir() if path.is_file()}


def test_steps_that_ended_within_an_epoch_go_on_there(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 3 batches an epoch: after 4 steps, 7 are wanted. The row of the epoch that ended early stays."""
    monkeypatch.chdir(tmp_path)
    whole, run = trained(data, "whole", steps=7), trained(data, "a", steps=4)
    bnlab.resume("a", steps=7)
    assert weights(run.last) == weights(whole.last)
    assert [(row["epoch"], row["step"]) for row in metrics(run)] == [("1", "3"), ("2", "4"), ("2", "6"), ("3", "7")]
    assert yaml.safe_load(run.recipe.read_text())["steps"] == 7


def finished(recipe: Recipe, **changes: Any) -> TrainState:
    """The state at the end of a training with 3 batches an epoch."""
    plan = Plan.of(recipe, 3)
    rows = [{"epoch": epoch, "val_top1": 0.5} for epoch in range(1, plan.epochs + 1)]
    state = TrainState(epoch=plan.epochs, step=plan.steps, plan=plan, rows=rows, best=rows[0])  # type: ignore[arg-type]
    for key, value in changes.items():
        setattr(state, key, value)
    return state


def longer(before: Recipe, state: TrainState | None = None, **changes: Any) -> TrainState:
    state = state or finished(before)
    extend(RUN, state, before, before.model_copy(update=changes))
    return state


@pytest.mark.parametrize("schedule", ["constant", "step", "exponential"])
def test_the_learning_rate_goes_on_and_the_size_stays(schedule: Any) -> None:
    recipe = Recipe(schedule=schedule, epochs=4, size=128, start_size=0.5)
    plan = longer(recipe, epochs=10).plan
    at_once = Plan(steps=30, batches=3)
    assert (plan.steps, plan.epochs) == (30, 10)
    assert [plan.learning_rate(recipe, step) for step in range(30)] == [
        at_once.learning_rate(recipe, step) for step in range(30)
    ]
    assert {plan.size(recipe, epoch) for epoch in range(4, 10)} == {128}
    assert [epoch for epoch in range(4, 10) if plan.validates(epoch)] == list(range(4, 10))
    assert longer(recipe, longer(recipe, epochs=10), epochs=11).plan.steps == 33


def test_an_unfinished_run_with_one_cycle_is_to_be_finished_first() -> None:
    """It may have no last.safetensors yet, from which a new run could begin."""
    recipe = Recipe(epochs=4)
    with pytest.raises(RunError, match=r"one-cycle, .*: leave epochs and steps out"):
        longer(recipe, finished(recipe, epoch=0, step=2), epochs=6)


def test_the_size_of_an_unfinished_run_does_not_fall() -> None:
    recipe = Recipe(schedule="constant", epochs=10, size=128, start_size=0.5)
    before = Plan.of(recipe, 3)
    state = finished(recipe, epoch=6, step=18)
    plan = longer(recipe, state, epochs=30).plan
    sizes = [plan.size(recipe, epoch) for epoch in range(6, 30)]
    assert sizes == sorted(sizes)
    assert sizes[0] >= before.size(recipe, 5)
    assert sizes[-1] == 128
    assert longer(recipe, finished(recipe, epoch=6, step=18), epochs=7).plan.epochs == 7


@pytest.mark.parametrize(
    ("before", "changes", "message"),
    [
        ({"epochs": 4}, {"epochs": 6}, r"one-cycle, .* 4 epochs: .*DATA --init runs/a/last.safetensors --epochs 2$"),
        ({"steps": 9}, {"steps": 12}, r"one-cycle, .* 9 steps: .*--init runs/a/last.safetensors --set steps=3$"),
        ({"time": 90, "steps": 9}, {"steps": 12}, r"from a given time: .*--init runs/a/last.safetensors --time 90s$"),
        ({"plan": [[0, 9, 1]]}, {"epochs": 4}, r"from a given time: .*DATA --init runs/a/last.safetensors$"),
        ({"steps": 4}, {"steps": 0, "epochs": 2}, r"one-cycle, .* 4 steps: .*--epochs 1$"),
        ({"schedule": "constant", "steps": 9}, {"epochs": 9}, "counts steps, not epochs: pass steps=NUMBER"),
        ({"schedule": "constant", "steps": 10}, {"steps": 10}, "has trained 10 steps already: pass a larger"),
        ({"schedule": "constant", "epochs": 4}, {"steps": 11}, "has trained 12 steps already: pass a larger"),
        ({"schedule": "constant", "epochs": 4}, {"epochs": 3}, "has trained 4 epochs already: pass a larger"),
    ],
    ids=str,
)
def test_what_cannot_go_on_is_refused_with_the_way(before: Any, changes: Any, message: str) -> None:
    with pytest.raises(RunError, match=message):
        longer(Recipe(**before), **changes)


def test_an_unfinished_run_for_a_given_time_is_resumed_without_a_number() -> None:
    recipe = Recipe(time=90, steps=9)
    with pytest.raises(RunError, match=r"runs/a follow from a given time: leave epochs and steps out$"):
        longer(recipe, finished(recipe, step=6), epochs=4)


def test_the_number_that_was_planned_changes_nothing() -> None:
    recipe = Recipe(epochs=4)
    state = finished(recipe, epoch=2, step=6)
    plan = state.plan
    assert longer(recipe, state, epochs=4).plan is plan


def test_patience_counts_anew() -> None:
    recipe = Recipe(schedule="constant", epochs=9, patience=2)
    state = finished(recipe, epoch=3, step=9)
    state.rows = state.rows[:3]
    assert out_of_patience(state, recipe)
    for number in (9, 12):
        longer(recipe, state, epochs=number)
        assert not out_of_patience(state, recipe)
        assert state.plan.epochs == number
    state.rows.append({"epoch": 4, "val_top1": 0.1})
    assert not out_of_patience(state, recipe)
    state.rows.append({"epoch": 5, "val_top1": 0.1})
    assert out_of_patience(state, recipe)
