"""A training as a whole: what it leaves, and that neither kills nor workers change a bit of it."""

import csv
import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from bnlab import Classifier, train
from bnlab.classifier.file import read_classifier
from bnlab.config import load_settings
from bnlab.errors import DataError, RunError, StorageError, UsageError
from bnlab.files import read_csv, read_json
from bnlab.progress import NullProgress
from bnlab.runs import Run
from bnlab.training import build, loop, run, session, time_budget, validate
from bnlab.training.build import TrainingContext
from bnlab.training.schedule import Plan, StepTimes
from bnlab.training.session import TrainingResult
from bnlab.training.state import TrainState
from bnlab.training.time_budget import TimeBudget
from tests.conftest import QUICK, write_photos

OPTIONS: dict[str, Any] = {
    "network": "bn_small_inception", "width": 0.25, "size": 32, "batch_size": 8, "learning_rate": 0.02, "epochs": 2,
    "workers": 0,
}  # fmt: skip


def trained_on(data: Path, name: str = "run", progress: NullProgress | None = None, **changes: Any) -> TrainingResult:
    settings, root = load_settings("default", OPTIONS | changes), data.parent / "runs"
    return run.train(data, settings, root=root, name=name, strict=False, progress=progress or NullProgress())


def resumed(folder: Path, name: str | None = "run", progress: NullProgress | None = None) -> TrainingResult:
    """Resume a run in `folder`/runs."""
    return run.resume(name, root=folder / "runs", changes={}, progress=progress or NullProgress())


@pytest.fixture
def finished(trained: Path, tmp_path: Path) -> Run:
    """A finished run that may be changed."""
    return Run(shutil.copytree(trained, tmp_path / "runs" / "run"))


def files(run: Run) -> tuple[bytes, bytes]:
    return run.best.read_bytes(), run.last.read_bytes()


def weights(run: Run) -> list[bytes]:
    """The tensors of both files without their cards, which name the recipe."""
    tensors = [read_classifier(path)[0] for path in (run.best, run.last)]
    return [some[name].numpy().tobytes() for some in tensors for name in sorted(some)]


def metrics(run: Run) -> list[dict[str, str]]:
    """metrics.csv without what depends on the clock."""
    with run.metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "images_per_second", "recalibration_seconds")}
        for row in rows
    ]


def test_the_small_network_learns_and_a_class_missing_in_val_shifts_no_label(tmp_path: Path) -> None:
    """Three shapes, twelve epochs: a loop that did not step, or shifted a label, would stay at a third."""
    data = tmp_path / "data"
    write_photos(data / "train", each=16)
    write_photos(data / "val", each=8, first=100)
    shutil.rmtree(data / "val" / "disc")
    result = trained_on(data, epochs=12, width=0.5, progress=(progress := NullProgress()))
    assert "val" in progress.warnings[0]
    assert "'disc'" in progress.warnings[0]
    assert result.evaluation.classes == ("disc", "ring", "stripes")
    assert result.evaluation.confusion.sum(1).tolist() == [0, 8, 8]
    assert result.val_top1 >= 0.75
    assert result.rows[-1]["train_loss"] < 0.75 * result.rows[0]["train_loss"]  # type: ignore[operator]


def test_the_seed_changes_the_weights(data: Path) -> None:
    assert files(trained_on(data, "a", epochs=1).run) != files(trained_on(data, "b", epochs=1, seed=1).run)


def command(home: Path, *arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "bnlab", "train", *map(str, arguments)]
    return subprocess.Popen(words, cwd=home, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for_saves(state: Path, saves: int, process: subprocess.Popen[str]) -> None:
    """Wait until state.pt was written so many times more."""
    last, deadline = state.stat().st_mtime_ns if state.exists() else 0, time.monotonic() + 120
    while saves and process.poll() is None and time.monotonic() < deadline:
        now = state.stat().st_mtime_ns if state.exists() else 0
        saves -= now != last
        last = now
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_three_times_and_resumed_it_ends_in_the_same_bits(data: Path) -> None:
    """kill -9 at three random moments, within epochs and writes; `test_dying_at_any_write` is quicker and without."""
    home, shared = data.parent, (*QUICK, "--epochs", 6, "--set", "checkpoint_seconds=0")
    whole = command(home, "data", *shared, "--name", "whole")
    assert whole.wait(timeout=300) == 0, whole.stdout.read()  # type: ignore[union-attr]
    whole.stdout.close()  # type: ignore[union-attr]
    moments = random.Random(0)
    run = Run(home / "runs" / "killed")
    for attempt in range(3):
        how = ("--resume",) if attempt else ("data", *shared)
        process = command(home, *how, "--name", "killed")
        wait_for_saves(run.state, moments.randint(1, 5), process)
        time.sleep(moments.random() * 0.05)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()  # type: ignore[union-attr]
        assert not run.report.exists()
    assert torch.load(run.state, weights_only=True)["state"]["step"] > 3
    result = resumed(data.parent, "killed")
    assert files(run) == files(Run(home / "runs" / "whole"))
    assert metrics(run) == metrics(Run(home / "runs" / "whole"))
    assert result.epochs == 6


class Death(BaseException):
    """What no `except Exception` catches, as a kill."""


def dying_at(fatal: int) -> Callable[[Path, Path], Path]:
    """Path.replace, which dies before its rename number `fatal`."""
    real, writes = Path.replace, itertools.count(1)

    def rename(self: Path, target: Path) -> Path:
        if next(writes) == fatal:
            raise Death
        return real(self, target)

    return rename


@pytest.mark.slow
@pytest.mark.parametrize("network", ["bn_small_inception", "bn_googlenet"])
def test_dying_at_any_write_it_ends_in_the_same_bits(data: Path, monkeypatch: pytest.MonkeyPatch, network: str) -> None:
    """Just before each rename of state, classifiers and metrics in two epochs, with and without auxiliary heads."""
    options = {"network": network, "auxiliary": network == "bn_googlenet", "batch_size": 12, "checkpoint_seconds": 0}
    whole = trained_on(data, "whole", **options).run
    for fatal in range(5, 13 if network == "bn_small_inception" else 9):
        name = f"dead{fatal}"
        with monkeypatch.context() as patch, pytest.raises(Death):
            patch.setattr(Path, "replace", dying_at(fatal))
            trained_on(data, name, **options)
        run = Run(data.parent / "runs" / name)
        (run.folder / ".0123.part").write_text("left by a kill")
        resumed(data.parent, name)
        assert files(run) == files(whole), fatal
        assert metrics(run) == metrics(whole)
        assert not list(run.folder.glob(".*.part"))


EVERYTHING: dict[str, Any] = {
    "size": 64, "start_size": 0.5, "ema": 0.9, "mixup": 0.5, "cutmix": 0.5, "color_jitter": 0.2,
    "recalibration_images": 10, "precision": "bfloat16", "flip_tta": True, "epochs": 2, "batch_size": 12,
}  # fmt: skip


@pytest.mark.slow
def test_with_all_that_a_recipe_has_neither_deaths_nor_caches_nor_workers_change_a_bit(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained_on(data, "whole", **EVERYTHING).run
    for cache, workers in (("none", 1), ("disk", 2)):
        other = trained_on(data, f"{cache}{workers}", **EVERYTHING, cache=cache, workers=workers)
        assert files(other.run) == files(whole)
        assert metrics(other.run) == metrics(whole)
    for fatal in (6, 9):
        name = f"dead{fatal}"
        with monkeypatch.context() as patch, pytest.raises(Death):
            patch.setattr(Path, "replace", dying_at(fatal))
            trained_on(data, name, **EVERYTHING, cache="disk", checkpoint_seconds=0)
        resumed(data.parent, name)
        assert files(Run(data.parent / "runs" / name)) == files(whole), fatal


def test_the_best_epoch_is_chosen_by_recalibrated_statistics(data: Path) -> None:
    """After a few steps the running statistics are almost the initial ones, by which the network does worse."""
    options = {"epochs": 3, "width": 1.0, "learning_rate": 0.01}
    result = trained_on(data, recalibration_images=24, **options)
    rows = result.rows
    best = max(rows, key=lambda row: (row["val_top1"], -row["val_loss"]))  # type: ignore[operator]
    assert result.val_top1 == best["val_top1"] == result.evaluation.top1
    tensors, _ = read_classifier(result.run.last)
    assert tensors["conv1.bn.num_batches_tracked"] == 3  # of the sample's 24 photos, not of 9 steps
    without = trained_on(data, "without", recalibration_images=0, bn_monitor=False, **options)
    assert [row["running_top1"] for row in without.rows] == [None] * 3
    assert [row["val_top1"] for row in without.rows] == [row["running_top1"] for row in rows]
    assert [row["train_loss"] for row in without.rows] == [row["train_loss"] for row in rows]
    losses = [[row["val_loss"] for row in some] for some in (rows, without.rows)]
    assert sum(losses[0]) < sum(losses[1])  # type: ignore[arg-type]


def test_epochs_without_validation_and_an_incomplete_last_epoch(data: Path) -> None:
    result = trained_on(data, steps=13, validate_every=2)
    assert [(row["epoch"], row["step"]) for row in result.rows] == [(1, 3), (2, 6), (3, 9), (4, 12), (5, 13)]
    assert [row["epoch"] for row in result.rows if row["val_top1"] is not None] == [2, 4, 5]
    assert [row["val_top1"] == "" for row in metrics(result.run)] == [True, False, True, False, False]


@pytest.mark.slow
def test_a_time_is_kept_and_its_training_can_be_killed_and_repeated(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which a step takes 0.2 s, later 0.4 s, an evaluation and the report 0.15 s, and nothing else."""
    now, begun, real_step = 1000.0, itertools.count(1), loop.train_step

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now

    def taking(seconds: Callable[[], float], real: Callable[..., Any]) -> Callable[..., Any]:
        def work(*arguments: Any, **options: Any) -> Any:
            nonlocal now
            now += seconds()
            return real(*arguments, **options)

        return work

    def step(*arguments: Any) -> Any:
        if arguments[3] == 10 and next(begun) == 1:
            raise Death
        return real_step(*arguments)

    progress = NullProgress()
    with monkeypatch.context() as patch:
        for module in (run, session, loop, time_budget, validate):
            patch.setattr(module, "time", Clock)
        for module in (loop, time_budget):
            patch.setattr(module, "train_step", taking(lambda: 0.2 if now < 1003.5 else 0.4, step))
        for module in (session, validate):
            patch.setattr(module, "evaluate", taking(lambda: 0.15, module.evaluate))
        report = taking(lambda: 0.15, lambda result: result.run.report.touch())
        arguments = {"root": data.parent / "runs", "progress": progress, "report": report}
        settings = load_settings("default", OPTIONS | {"time": "8s"})
        with pytest.raises(Death):
            run.train(data, settings, name="timed", strict=False, **arguments)
        file = data.parent / "runs" / "timed" / "recipe.yaml"
        planned, lines = yaml.safe_load(file.read_text())["plan"], file.read_text().splitlines()
        assert not (data.parent / "runs" / "timed" / "report.html").exists()
        timed = run.resume("timed", changes={}, **arguments)
    assert 0.95 * 8 <= now - 1000 - 0.4 + 0.8 <= 8  # without the step that was lost, with the end of the process
    assert progress.warnings[0].startswith("epochs has no effect")
    assert progress.warnings[1].startswith("slower than planned")
    assert timed.run.report.exists()
    now_lines = timed.run.recipe.read_text().splitlines()
    assert {line.partition(":")[0] for line in {*now_lines} - {*lines}} <= {"steps", "plan"}  # origins stay
    assert "(yours)" in next(line for line in now_lines if line.startswith("width"))
    recipe = yaml.safe_load(timed.run.recipe.read_text())
    assert (recipe["time"], recipe["validate_every"]) == (None, 0)
    timed.run.recipe.write_text("\n".join(lines))  # killed after the last state.pt and before recipe.yaml
    run.resume("timed", changes={"workers": 1}, **arguments)
    assert timed.run.recipe.read_text().splitlines() == now_lines
    assert recipe["plan"][: len(planned)] == planned
    assert len(recipe["plan"]) > len(planned) > 1
    assert recipe["plan"][-1][1] == recipe["steps"] == timed.rows[-1]["step"]
    assert [list(change) for change in read_classifier(timed.run.last)[1].recipe["plan"]] == recipe["plan"]
    arguments = {"root": data.parent / "runs", "progress": NullProgress()}
    again = run.train(data, load_settings(timed.run.recipe), name="again", strict=False, **arguments)
    assert weights(again.run) == weights(timed.run)
    assert metrics(again.run) == metrics(timed.run)


def test_a_time_too_short_for_a_step_is_refused(data: Path) -> None:
    with pytest.raises(UsageError, match=r"not one step fits into 0 s: .*more time"):
        trained_on(data, time=0.01)
    assert trained_on(data, epochs=1).epochs == 1  # under the same name


SLOW = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("changes", [{4: 5}, SLOW({2: 4, 3: 9}), SLOW({7: 8})], ids=str)
def test_a_plan_that_changes_within_an_epoch_is_kept_and_resumed(
    data: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[int, int]
) -> None:
    """Of 9 steps, 3 in an epoch: the training ends at the step of its last plan, at its lowest rate."""

    def planned(self: TimeBudget, context: TrainingContext, *_: object) -> tuple[Plan, StepTimes]:
        times = StepTimes(steps={32: 1.0}, validation=0.0, last=0.0)
        return Plan(steps=1, batches=context.loader.batches).changed(0, 9, 1), times

    def replanned(self: TimeBudget, state: TrainState, *_: object) -> Plan:
        steps = changes.get(state.step, state.plan.steps)
        return state.plan if steps == state.plan.steps else state.plan.changed(state.step, steps, 1)

    monkeypatch.setattr(TimeBudget, "planned", planned)
    monkeypatch.setattr(TimeBudget, "replanned", replanned)
    options = {"time": 3600, "checkpoint_seconds": 0, "size": 64}
    whole = trained_on(data, "whole", **options)
    last = whole.rows[-1]
    assert last["step"] == list(changes.values())[-1]
    assert last["learning_rate"] == pytest.approx(0.02e-4)
    assert last["val_top1"] is not None
    assert [row["step"] for row in whole.rows[:-1]] == [3, 6][: len(whole.rows) - 1]
    real, steps = loop.train_step, itertools.count(1)

    def dying(*arguments: Any) -> object:
        if next(steps) == 6:
            raise Death
        return real(*arguments)

    if int(last["step"] or 0) >= 6:
        with monkeypatch.context() as patch, pytest.raises(Death):
            patch.setattr(loop, "train_step", dying)
            trained_on(data, "dead", **options)
        resumed(data.parent, "dead")
        assert weights(Run(data.parent / "runs" / "dead")) == weights(whole.run)


def test_a_training_with_accumulated_batches_is_that_with_the_large_batch(data: Path) -> None:
    """On a network without BN, to 1e-6: the schedule, the average of the weights, and batches of 6 and 7 photos."""
    write_photos(data / "train", each=1, classes=("ring",), first=50)  # 25 photos, in steps of 12 and 13
    options = {"network": "mlp", "size": 16, "ema": 0.9, "precision": "float32"}
    large = trained_on(data, "large", batch_size=14, **options)
    parts = trained_on(data, "parts", batch_size=7, accumulate=2, **options)
    assert parts.rows[-1]["step"] == large.rows[-1]["step"] == 4
    expected, found = (read_classifier(result.run.last)[0] for result in (large, parts))
    assert max(float((found[key] - expected[key]).abs().max()) for key in expected) < 1e-6
    assert parts.rows[-1]["train_loss"] == pytest.approx(large.rows[-1]["train_loss"])
    assert parts.rows[-1]["train_top1"] == large.rows[-1]["train_top1"]


def test_the_statistics_move_as_far_where_a_step_has_fewer_batches_than_were_asked_for(data: Path) -> None:
    """All 24 photos are one step, and of 100 batches 12 have two photos each: the first step moves as far as one."""
    options = {"network": "bn_mlp", "epochs": 1, "batch_size": 24, "norm_momentum": 0.5, "bn_monitor": False}
    moved = []
    for name, accumulate in (("asked", 100), ("made", 12)):
        result = trained_on(data, name, **options, accumulate=accumulate, recalibration_images=0)
        state = torch.load(result.run.state, weights_only=True)["network"]
        moved.append(next(tensor for key, tensor in state.items() if key.endswith("running_mean")))
    assert torch.equal(*moved)


def test_a_resumed_training_with_accumulated_batches_ends_in_the_same_weights(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed within a step, between its batches; with BN, whose running statistics move as far as by one batch."""
    options = {
        "network": "bn_mlp", "size": 16, "batch_size": 4, "accumulate": 2, "dropout": 0.5, "mixup": 0.5,
        "clip_norm": 0.5, "optimizer": "adamw", "checkpoint_seconds": 0,
    }  # fmt: skip
    whole = trained_on(data, "whole", **options)
    real, batches, momenta = loop.loss_of, itertools.count(1), set()

    def dying(*arguments: Any) -> object:
        if next(batches) == 4:
            raise Death
        return real(*arguments)

    def noting(context: TrainingContext, *arguments: Any) -> object:
        momenta.add(context.network.get_submodule("hidden1").bn.momentum)
        return step(context, *arguments)

    step = loop.train_step
    with monkeypatch.context() as patch, pytest.raises(Death):
        patch.setattr(loop, "loss_of", dying)
        trained_on(data, "dead", **options)
    monkeypatch.setattr(loop, "train_step", noting)
    resumed(data.parent, "dead")
    assert weights(Run(data.parent / "runs" / "dead")) == weights(whole.run)
    assert momenta == {1 - (1 - 0.1) ** (1 / 2)}


def test_patience_counts_from_validation_to_validation(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = validate.evaluate
    validations = itertools.count()

    def worse(*arguments: Any, **options: Any) -> object:
        """Each validation is worse than the one before."""
        evaluation = real(*arguments, **options)
        wrong = (evaluation.targets + 1) % 3
        keep = max(0, 6 - next(validations))
        chosen = np.where(np.arange(evaluation.n) < keep, evaluation.targets, wrong)
        return replace(evaluation, probabilities=np.eye(3, dtype=np.float32)[chosen])

    monkeypatch.setattr(validate, "evaluate", worse)
    result = trained_on(data, epochs=20, validate_every=3, patience=2, recalibration_images=0)
    assert [row["epoch"] for row in result.rows if row["val_top1"] is not None] == [3, 6]


def contents(run: Run) -> dict[Path, tuple[bytes, int]]:
    """The bytes of each file of a run, and when it was written."""
    listed = [path for path in run.folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in listed}


def test_a_run_is_not_resumed_on_other_photos_and_keeps_all_its_files(finished: Run, trained: Path) -> None:
    """Photos that were replaced under the same names, in the place of the run or in one that the user gives."""
    home = finished.folder.parents[1]
    data = Path(shutil.copytree(trained.parents[1] / "data", home / "data"))
    (finished.folder / ".0123.part").write_text("left by a kill")
    photo, before = data / "train" / "disc" / "disc000.png", contents(finished)
    original = photo.read_bytes()
    shutil.copy(data / "val" / "ring" / "ring100.png", photo)
    arguments: dict[str, Any] = {"root": home / "runs", "changes": {}, "progress": NullProgress(), "data": data}
    with pytest.raises(DataError, match=rf"in {data} 1 photo has other content .*{photo}.*resume\('run', data=DATA"):
        run.resume("run", **arguments)
    photo.unlink()
    with pytest.raises(DataError, match=rf"in {data} 1 photo cannot be read .*{photo}.*no such file"):
        run.resume("run", **arguments)
    assert contents(finished) == before
    photo.write_bytes(original)
    assert run.resume("run", **arguments).epochs == 2
    assert read_json(finished.folder / "data.json")["from_run"] == "../../data"
    changed = {path.name for path, content in before.items() if path.exists() and path.read_bytes() != content[0]}
    assert changed <= {"data.json", "report.html"}


def test_photos_that_change_before_the_first_step_stop_a_training(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = build.prepare

    def prepare(*arguments: Any, **options: Any) -> object:
        prepared = real(*arguments, **options)
        (data / "train" / "disc" / "disc000.png").write_text("text")
        return prepared

    monkeypatch.setattr(build, "prepare", prepare)
    with pytest.raises(DataError, match=r"1 photo changed while photos were read \(.*disc000\.png\)"):
        trained_on(data)
    assert not (data.parent / "runs").exists()


def test_refused_photos_are_listed_and_an_early_kill_leaves_the_name_free(data: Path, locked: str) -> None:
    (data / "train" / "ring" / locked).mkdir()
    for number in range(7):
        (data / "train" / "disc" / f"bad{number}.jpg").write_text("text")
    early = data.parent / "runs" / "run"
    early.mkdir(parents=True)
    (early / "split.csv").write_text("half")
    (early / ".0123.part").write_text("half")
    with pytest.raises(RunError, match="exists already"):
        trained_on(data, epochs=1)  # this may be any list of the user's
    (early / ".lock").touch()
    result = trained_on(data, epochs=1)
    run, names = result.run, [locked, *(f"bad{number}.jpg" for number in range(7))]
    assert run.folder == early
    assert [Path(row["path"]).name for row in read_csv(run.refused)] == names
    assert [refusal.is_folder for refusal in result.refused] == [True] + [False] * 7
    assert resumed(data.parent, None).refused == result.refused
    rows = [",".join(line.split(",")[:3]) for line in run.refused.read_text().splitlines()]
    run.refused.write_text("\n".join(rows))  # as an earlier bnlab wrote it, without the column `kind`
    assert [Path(refusal.path).name for refusal in resumed(data.parent, None).refused] == names
    with pytest.raises(RunError, match="exists already"):
        trained_on(data, epochs=1)


def test_a_run_that_goes_on_elsewhere_warns_and_a_finished_one_stays(finished: Run) -> None:
    before = files(finished)
    environment = json.loads(finished.environment.read_text())
    finished.environment.write_text(json.dumps(environment | {"processor": "an abacus", "threads": 77}))
    progress = NullProgress()
    again = resumed(finished.folder.parents[1], None, progress)
    assert (again.epochs, again.val_top1, files(again.run)) == (
        2,
        read_classifier(finished.best)[1].metrics["top1"],
        before,
    )
    assert [warning.split(",")[0] for warning in progress.warnings] == [
        "this run began with other threads", "this run began with other processor",
    ]  # fmt: skip


def test_a_run_in_use_is_refused(finished: Run) -> None:
    with finished.locked(), pytest.raises(RunError, match=r"runs/run is in use by another training"):
        resumed(finished.folder.parents[1])


def test_a_full_disk_stops_with_all_files_complete(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained_on(data, "whole", epochs=3).run
    real, writes = Path.replace, itertools.count(1)

    def filling_up(self: Path, target: Path) -> Path:
        if (
            next(writes) > 11
        ):  # the list, the place of the photos, the environment, the recipe, the state, epoch 1, a part of epoch 2
            raise OSError(28, "No space left on device")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", filling_up)
        with pytest.raises(StorageError, match=r"no space left on the device to write .*runs/full/"):
            trained_on(data, "full", epochs=3)
    full = Run(data.parent / "runs" / "full")
    Classifier.load(full.best)
    Classifier.load(full.last)
    resumed(data.parent, "full")
    assert files(full) == files(whole)


def test_settings_without_effect_are_warned_of_and_a_training_leaves_torchs_generator_alone(data: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    trained_on(data, epochs=1, step_every=3, progress=(progress := NullProgress()))
    assert torch.equal(torch.rand(2), expected)
    assert progress.warnings == ["step_every has no effect: it is for schedule step"]


@pytest.mark.slow
@pytest.mark.parametrize("network", ["bn_googlenet", "googlenet"])
@pytest.mark.parametrize("size", [32, 96, 224])
def test_the_classic_recipe_trains_at_any_size(tmp_path: Path, network: str, size: int) -> None:
    write_photos(tmp_path / "data" / "train", each=4)
    write_photos(tmp_path / "data" / "val", each=2, first=50)
    result = train(
        tmp_path / "data", recipe="classic", runs=tmp_path / "runs", network=network, size=size, epochs=1, batch_size=6
    )
    assert (result.rows[0]["size"], result.rows[0]["step"], result.evaluation.n) == (size, 2, 6)
    assert read_classifier(result.run.best)[1].preprocessing.size == size


def test_a_run_of_another_version_is_refused_before_its_recipe_is_read(data: Path) -> None:
    """Its recipe may have keys that have another name now."""
    run = trained_on(data, epochs=1).run
    torch.save(torch.load(run.state, weights_only=True) | {"format": 2}, run.state)
    run.recipe.write_text("grow_from: 0.5\n")
    with pytest.raises(RunError, match=r"run/state.pt has format 2, and this bnlab reads format 4"):
        resumed(data.parent, "run")
