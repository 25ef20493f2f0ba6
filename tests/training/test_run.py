"""A training as a whole: what it leaves, and that neither kills, nor workers, nor the order of classes change it."""

import csv
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

from bnlab import Classifier, resume, train
from bnlab.classifier.card import to_json
from bnlab.classifier.evaluate import evaluate
from bnlab.classifier.file import read_classifier
from bnlab.data.dataset import open_evaluation_data
from bnlab.errors import (
    ClassifierError,
    DivergedError,
    Interrupted,
    OutOfMemoryError,
    PhotoError,
    RunError,
    StorageError,
    UsageError,
)
from bnlab.files import read_csv
from bnlab.progress import NullProgress
from bnlab.recipe import Recipe
from bnlab.runs import Run
from bnlab.training import loop, run, validate
from bnlab.training.run import TrainingResult
from bnlab.training.schedule import Plan, StepTimes
from bnlab.training.state import TrainState
from bnlab.training.time_budget import TimeBudget
from tests.conftest import QUICK, write_photos

OPTIONS: dict[str, object] = {
    "network": "bn_small_inception", "size": 32, "batch_size": 8, "learning_rate": 0.02, "epochs": 2, "workers": 0,
}  # fmt: skip


def trained_on(
    data: Path, name: str = "run", progress: NullProgress | None = None, **changes: object
) -> TrainingResult:
    return train(data, name=name, runs=data.parent / "runs", progress=progress, **(OPTIONS | changes))  # type: ignore[arg-type]


def weights(run: Run) -> tuple[bytes, bytes]:
    return run.best.read_bytes(), run.last.read_bytes()


def metrics(run: Run) -> list[dict[str, str]]:
    """metrics.csv without what depends on the clock."""
    with run.metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "images_per_second", "recalibration_seconds")}
        for row in rows
    ]


def test_a_run_holds_all_that_is_promised(trained: Path) -> None:
    run = Run(trained)
    names = {p.name for p in trained.iterdir()} - {".lock"}
    assert names == {
        "recipe.yaml", "split.csv", "metrics.csv", "health.csv", "best.safetensors", "last.safetensors", "state.pt",
        "environment.json", "report.html", "tensorboard",
    }  # fmt: skip
    rows = metrics(run)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    _, card = read_classifier(run.best)
    best = max(rows, key=lambda row: (float(row["val_top1"]), -float(row["val_loss"])))
    assert card.metrics["epoch"] == int(best["epoch"])
    assert (card.metrics["split"], card.metrics["n"], card.metrics["top1"]) == ("val", 12, float(best["val_top1"]))
    assert card.classes == ("disc", "ring", "stripes")
    assert any((trained / "tensorboard").iterdir())


def test_the_small_network_learns(tmp_path: Path) -> None:
    """Three shapes, twelve epochs: a loop that forgot to step, or shifted a label, would stay at a third."""
    write_photos(tmp_path / "data" / "train", each=16)
    write_photos(tmp_path / "data" / "val", each=8, first=100)
    result = trained_on(tmp_path / "data", epochs=12)
    assert result.val_top1 >= 0.75
    assert result.rows[-1]["train_loss"] < 0.75 * result.rows[0]["train_loss"]


def test_its_own_evaluation_is_everyones(data: Path) -> None:
    """The probabilities training judged by, and those of the file, whatever the batch: within 1e-5."""
    validate = []
    real = loop.record_validation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "record_validation", lambda p, row, j: (validate.append(j.evaluation), real(p, row, j))[1])
        result = trained_on(data, epochs=1)
    side, photos = open_evaluation_data(data, "val")
    classifier = Classifier.load(result.run.last)
    for batch_size in (1, 64):
        after = evaluate(classifier, photos, side, batch_size=batch_size)
        assert after.paths == validate[0].paths
        assert abs(after.probabilities - validate[0].probabilities).max() < 1e-5
        predictions = classifier.predict(validate[0].paths, batch_size=batch_size)
        for prediction, row in zip(predictions, validate[0].probabilities, strict=True):
            said = {c.label: c.probability for c in prediction.top}
            assert [said[label] for label in classifier.classes] == pytest.approx(row.tolist(), abs=1e-5)


def test_workers_change_no_weight(data: Path) -> None:
    runs = [trained_on(data, name=f"w{workers}", workers=workers).run for workers in (0, 1, 2)]
    assert weights(runs[0]) == weights(runs[1]) == weights(runs[2])
    assert metrics(runs[0]) == metrics(runs[1]) == metrics(runs[2])


def test_the_seed_changes_every_weight(data: Path) -> None:
    assert weights(trained_on(data, "a").run) != weights(trained_on(data, "b", seed=1).run)


def test_a_class_missing_in_val_shifts_no_label(data: Path) -> None:
    progress = NullProgress()
    shutil.rmtree(data / "val" / "disc")
    result = trained_on(data, progress=progress, epochs=12)
    assert progress.warnings[0].startswith("val has no photo of class 'disc', so how well it is known will not be")
    assert result.evaluation.classes == ("disc", "ring", "stripes")
    assert result.evaluation.confusion.sum(1).tolist() == [0, 4, 4]
    assert result.val_top1 >= 0.6


def command(home: Path, *arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "bnlab", "train", *map(str, arguments)]
    return subprocess.Popen(words, cwd=home, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for_saves(state: Path, saves: int, process: subprocess.Popen[str]) -> None:
    """Until state.pt was written so many times more."""
    last, deadline = state.stat().st_mtime_ns if state.exists() else 0, time.monotonic() + 60
    while saves and process.poll() is None and time.monotonic() < deadline:
        now = state.stat().st_mtime_ns if state.exists() else 0
        saves -= now != last
        last = now
        time.sleep(0.002)


def test_killed_three_times_and_resumed_it_ends_the_same(data: Path) -> None:
    """kill -9 at three random moments, mid-epoch and mid-write as they come; then the same bits."""
    home, shared = data.parent, (*QUICK, "--epochs", 6, "--set", "checkpoint_seconds=0", "--set", "auxiliary=false")
    whole = command(home, "data", *shared, "--name", "whole")
    assert whole.wait(timeout=120) == 0, whole.stdout.read()  # type: ignore[union-attr]
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
    resumed = resume("killed", runs=home / "runs")
    assert weights(run) == weights(Run(home / "runs" / "whole"))
    assert metrics(run) == metrics(Run(home / "runs" / "whole"))
    assert resumed.epochs == 6


class Death(BaseException):
    """What no `except Exception` catches, as a kill."""


def dying_at(fatal: int) -> Callable[[Path, Path], Path]:
    """Path.replace that dies just before its so-manieth rename."""
    real, writes = Path.replace, itertools.count(1)

    def rename(self: Path, target: Path) -> Path:
        if next(writes) == fatal:
            raise Death
        return real(self, target)

    return rename


@pytest.mark.parametrize("network", ["bn_small_inception", pytest.param("bn_googlenet", marks=pytest.mark.slow)])
def test_dying_at_any_write_it_ends_the_same(data: Path, monkeypatch: pytest.MonkeyPatch, network: str) -> None:
    """Just before each rename of two epochs, state and classifiers and metrics alike, auxiliary heads and all."""
    options = {"network": network, "auxiliary": network == "bn_googlenet", "batch_size": 12, "checkpoint_seconds": 0}
    whole = trained_on(data, "whole", **options).run
    for fatal in range(4, 14 if network == "bn_small_inception" else 8):
        name = f"dead{fatal}"
        with monkeypatch.context() as patch, pytest.raises(Death):
            patch.setattr(Path, "replace", dying_at(fatal))
            trained_on(data, name, **options)
        run = Run(data.parent / "runs" / name)
        (run.folder / ".0123.part").write_text("left by a kill")
        resume(name, runs=data.parent / "runs")
        assert weights(run) == weights(whole), fatal
        assert metrics(run) == metrics(whole)
        assert not list(run.folder.glob(".*.part"))


EVERYTHING: dict[str, object] = {
    "size": 64, "start_size": 0.5, "ema": 0.9, "mixup": 0.5, "cutmix": 0.5, "color_jitter": 0.2,
    "recalibration_images": 10,
    "precision": "bfloat16", "flip_tta": True, "epochs": 3, "batch_size": 12,
}  # fmt: skip


def test_with_all_that_a_recipe_has_neither_deaths_nor_caches_nor_workers_change_a_bit(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained_on(data, "whole", **EVERYTHING).run
    for cache, workers in (("none", 0), ("disk", 2), ("ram", 1)):
        other = trained_on(data, f"{cache}{workers}", **EVERYTHING, cache=cache, workers=workers)
        assert weights(other.run) == weights(whole)
        assert metrics(other.run) == metrics(whole)
    for fatal in (6, 11):
        name = f"dead{fatal}"
        with monkeypatch.context() as patch, pytest.raises(Death):
            patch.setattr(Path, "replace", dying_at(fatal))
            trained_on(data, name, **EVERYTHING, cache="disk", checkpoint_seconds=0)
        resume(name, runs=data.parent / "runs")
        assert weights(Run(data.parent / "runs" / name)) == weights(whole), fatal


def test_best_is_chosen_by_recalibrated_statistics(data: Path) -> None:
    """After a handful of steps the running ones are those it began with, and both accuracies are told."""
    result = trained_on(data, epochs=3, recalibration_images=24, learning_rate=0.01)
    rows = result.rows
    best = max(rows, key=lambda row: (row["val_top1"], -row["val_loss"]))  # type: ignore[operator]
    assert result.val_top1 == best["val_top1"] == result.evaluation.top1
    assert all(0 <= row["running_top1"] <= 1 for row in rows)  # type: ignore[operator]
    tensors, _ = read_classifier(result.run.last)
    assert tensors["conv1.bn.num_batches_tracked"] == 3  # of the sample's 24 photos, not of 9 steps
    without = trained_on(data, "without", epochs=3, recalibration_images=0, learning_rate=0.01)
    assert [row["running_top1"] for row in without.rows] == [None] * 3
    assert [row["val_top1"] for row in without.rows] == [row["running_top1"] for row in rows]
    assert [row["train_loss"] for row in without.rows] == [row["train_loss"] for row in rows]
    losses = [[row["val_loss"] for row in some] for some in (rows, without.rows)]
    assert sum(losses[0]) < sum(losses[1])  # type: ignore[arg-type]


def test_epochs_that_are_not_judged_have_no_val(data: Path) -> None:
    result = trained_on(data, epochs=5, validate_every=2)
    validate = [int(row["epoch"] or 0) for row in result.rows if row["val_top1"] is not None]
    assert validate == [2, 4, 5]
    with result.run.metrics.open(newline="") as file:
        assert [row["val_top1"] == "" for row in csv.DictReader(file)] == [True, False, True, False, False]


def test_a_training_of_so_many_steps_ends_within_an_epoch(data: Path) -> None:
    result = trained_on(data, steps=4)
    assert [(row["epoch"], row["step"]) for row in result.rows] == [(1, 3), (2, 4)]
    assert result.rows[-1]["val_top1"] is not None


def test_a_time_is_kept_and_its_plan_can_be_repeated(data: Path) -> None:
    began = time.monotonic()
    timed = trained_on(data, "timed", time="8s", epochs=500, progress=(told := NullProgress()))
    assert 3 < time.monotonic() - began < 10
    recipe = yaml.safe_load(timed.run.recipe.read_text())
    steps, every = recipe["steps"], recipe["validate_every"]
    assert timed.rows[-1]["step"] <= steps
    if told.warnings:
        pytest.skip("a machine that became slower meanwhile shortened the plan")
    again = trained_on(data, "again", steps=steps, validate_every=every, epochs=500).run
    assert weights_alone(again) == weights_alone(timed.run)


@pytest.mark.parametrize("changes", [{4: 5}, {4: 7}, {2: 4, 3: 9}, {7: 8}], ids=str)
def test_a_plan_that_changes_within_an_epoch_is_kept_and_resumed(
    data: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[int, int]
) -> None:
    """Of 9 steps, 3 to an epoch: the training ends at the step it then has, its rate at its lowest."""

    def planned(self: TimeBudget, context: loop.TrainingContext, *_: object) -> tuple[Recipe, StepTimes]:
        plan = {"steps": 9, "validate_every": 1}
        return context.recipe.model_copy(update=plan), StepTimes(steps={32: 1.0}, validation=0.0, last=0.0)

    def replanned(self: TimeBudget, position: TrainState, *_: object) -> Plan:
        steps = changes.get(position.step, position.plan.steps)
        return position.plan if steps == position.plan.steps else position.plan.changed(position.step, steps)

    monkeypatch.setattr(TimeBudget, "planned", planned)
    monkeypatch.setattr(TimeBudget, "replanned", replanned)
    options = {"time": 3600, "checkpoint_seconds": 0, "size": 64}
    whole = trained_on(data, "whole", **options)
    last = whole.rows[-1]
    assert last["step"] == list(changes.values())[-1]
    assert last["learning_rate"] == pytest.approx(0.02e-4)
    assert last["val_top1"] is not None
    assert [row["step"] for row in whole.rows[:-1]] == [3, 6][: len(whole.rows) - 1]
    real, steps = loop.train_step, 0

    def dying(*arguments: object) -> object:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise Death
        return real(*arguments)  # type: ignore[arg-type]

    if int(last["step"] or 0) >= 6:
        with monkeypatch.context() as patch, pytest.raises(Death):
            patch.setattr(loop, "train_step", dying)
            trained_on(data, "dead", **options)
        resume("dead", runs=data.parent / "runs")
        assert weights_alone(Run(data.parent / "runs" / "dead")) == weights_alone(whole.run)


def test_patience_waits_for_a_judgement(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    real = validate.evaluate
    answers = iter(range(100))

    def worse(*arguments: object, **options: object) -> object:
        """Each judgement is worse than the one before."""
        evaluation = real(*arguments, **options)  # type: ignore[arg-type]
        wrong = (evaluation.targets + 1) % 3
        keep = max(0, 6 - next(answers))
        chosen = np.where(np.arange(evaluation.n) < keep, evaluation.targets, wrong)
        return replace(evaluation, probabilities=np.eye(3, dtype=np.float32)[chosen])

    monkeypatch.setattr(validate, "evaluate", worse)
    result = trained_on(data, epochs=20, validate_every=3, patience=2, recalibration_images=0)
    assert [row["epoch"] for row in result.rows if row["val_top1"] is not None] == [3, 6]


def weights_alone(run: Run) -> list[bytes]:
    """Without the card, which names the recipe."""
    tensors = [read_classifier(path)[0] for path in (run.best, run.last)]
    return [some[name].numpy().tobytes() for some in tensors for name in sorted(some)]


def test_a_time_too_short_for_a_step_is_refused(data: Path) -> None:
    with pytest.raises(UsageError, match=r"not one step fits into 0 s: .*: give more --time, or a smaller --size"):
        trained_on(data, time=0.01)


def test_the_health_of_normalisation_is_written_and_watching_changes_nothing(data: Path) -> None:
    watched = trained_on(data, epochs=4)
    rows = list(read_csv(watched.run.health))
    assert {"name", "effective_batch", "mean_off", "dead"} <= rows[0].keys()
    assert rows[0]["name"] == "conv1.bn"
    assert len(rows) == sum(name.endswith("running_mean") for name in read_classifier(watched.run.last)[0])
    assert weights_alone(trained_on(data, "unwatched", epochs=4, bn_monitor=False).run) == weights_alone(watched.run)


def test_a_val_photo_gone_bad_stops_by_name(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs must be judged alike, so it is not left out in silence."""
    real = loop.record_validation

    def spoil(*arguments: object) -> object:
        (data / "val" / "ring" / "ring100.png").write_text("text")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "record_validation", spoil)
    with pytest.raises(PhotoError) as error:
        trained_on(data, cache="none")
    assert str(error.value) == (
        f"{data}/val/ring/ring100.png cannot be used, it is not an image that Pillow can read: restore it, "
        f"and go on with: bnlab.resume('run', runs='{data.parent}/runs')"
    )


def test_tensorboard_keeps_every_epoch_through_resumes(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    real, epochs = loop.record_validation, 0

    def interrupted(*arguments: object) -> object:
        nonlocal epochs
        epochs += 1
        if epochs == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop, "record_validation", interrupted)
        trained_on(data, epochs=3)
    for _ in range(2):  # the second time it is complete
        resume("run", runs=data.parent / "runs")
    events = EventAccumulator(str(data.parent / "runs" / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("val/top1")] == [3, 6, 9]


def test_refused_photos_are_written_down(data: Path) -> None:
    for number in range(7):
        (data / "train" / "disc" / f"bad{number}.jpg").write_text("text")
    rows = list(read_csv(trained_on(data, epochs=1).run.refused))
    assert [Path(row["path"]).name for row in rows] == [f"bad{number}.jpg" for number in range(7)]


def test_a_start_that_was_killed_can_be_begun_again(data: Path) -> None:
    early = data.parent / "runs" / "run"
    early.mkdir(parents=True)
    (early / "split.csv").write_text("half")
    (early / ".0123.part").write_text("half")
    with pytest.raises(RunError, match="exists already: take another --name"):
        trained_on(data, epochs=1)  # that could be anybody's list
    (early / ".lock").touch()
    assert trained_on(data, epochs=1).run.folder == early
    with pytest.raises(RunError, match="exists already"):
        trained_on(data, epochs=1)


def test_a_run_that_goes_on_elsewhere_says_so(data: Path) -> None:
    result = trained_on(data, epochs=1)
    environment = json.loads(result.run.environment.read_text())
    result.run.environment.write_text(json.dumps(environment | {"processor": "an abacus", "threads": 77}))
    progress = NullProgress()
    resume("run", runs=data.parent / "runs", progress=progress)
    assert progress.warnings == [
        "this run began with other threads, so it does not go on bit for bit",
        "this run began with other processor, so it does not go on bit for bit",
    ]


def test_full_memory_is_told(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(loop, "loss_of", full)
    with pytest.raises(
        OutOfMemoryError, match=r"out of memory at a batch size of 8 and a size of 32 px: close what else"
    ):
        trained_on(data)


def test_options_without_effect_say_so(data: Path) -> None:
    progress = NullProgress()
    trained_on(data, progress=progress, epochs=1, val=0.5, auxiliary=True, step_every=3)
    assert progress.warnings == [
        "step_every has no effect: it is for schedule step",
        "auxiliary has no effect: bn_small_inception has no auxiliary heads",
        "val has no effect: these photos have a val split of their own",
    ]


def test_seconds_count_validation(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    real = validate.evaluate
    monkeypatch.setattr(validate, "evaluate", lambda *a, **k: (time.sleep(0.4), real(*a, **k))[1])
    assert trained_on(data, epochs=2).seconds > 0.8


def test_an_init_with_a_tensor_missing_is_refused(data: Path, trained: Path, tmp_path: Path) -> None:
    tensors, card = read_classifier(trained / "best.safetensors")
    del tensors["inception2a.branch1.conv.weight"]
    (tmp_path / "x.safetensors").write_bytes(safetensors.torch.save(tensors, {"bnlab": to_json(card)}))
    with pytest.raises(ClassifierError, match=r"lacks the tensor inception2a.branch1.conv.weight"):
        trained_on(data, init=str(tmp_path / "x.safetensors"))
    assert not (data.parent / "runs").exists()


def test_ctrl_c_saves_and_says_how_to_go_on(data: Path) -> None:
    class Impatient(NullProgress):
        """Presses Ctrl-C as the fifth batch is done."""

        batches = 0

        def task(self, title: str, total: int, unit: str, done: int = 0):  # type: ignore[no-untyped-def]
            context = super().task(title, total, unit, done)
            return self if title == "training" else context

        def __enter__(self) -> "Impatient":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def advance(self, count: int = 1, **_: float) -> None:
            self.batches += 1
            if self.batches == 5:
                os.kill(os.getpid(), signal.SIGINT)

    whole = trained_on(data, "whole", epochs=3).run
    with pytest.raises(Interrupted) as stop:
        trained_on(data, "stopped", progress=Impatient(), epochs=3)
    assert stop.value.message == (
        f"interrupted after step 5, and saved; go on with: bnlab.resume('stopped', runs='{data.parent}/runs')"
    )
    assert resume("stopped", runs=data.parent / "runs").run.folder.name == "stopped"
    assert weights(whole) == weights(Run(data.parent / "runs" / "stopped"))


def test_a_finished_run_resumes_to_itself(data: Path) -> None:
    result = trained_on(data, epochs=1)
    before = weights(result.run)
    again = resume(runs=data.parent / "runs")
    assert (again.epochs, again.val_top1, weights(again.run)) == (1, result.val_top1, before)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_a_loss_that_is_no_number_stops_the_training(data: Path) -> None:
    with pytest.raises(DivergedError) as error:
        trained_on(data, network="small_inception", learning_rate=1e6, epochs=3)
    text = str(error.value)
    assert text.startswith(
        ("the loss became nan at step ", "the loss became inf at step ", "the network's probabilities")
    )
    assert "--learning-rate" in text


def test_patience_ends_a_training_early(data: Path) -> None:
    result = trained_on(data, learning_rate=1e-9, schedule="constant", epochs=40, patience=2)
    best = next(row for row in result.rows if row["val_top1"] == result.val_top1)
    assert 3 <= result.epochs < 40
    assert result.epochs - best["epoch"] >= 2


def test_a_run_in_use_is_refused(data: Path) -> None:
    result = trained_on(data, epochs=1)
    with result.run.locked(), pytest.raises(RunError, match=r"runs/run is in use by another training"):
        resume("run", runs=data.parent / "runs")


def test_a_full_disk_stops_with_all_that_was_there(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained_on(data, "whole", epochs=3).run
    real, calls = os.fsync, 0

    def filling_up(number: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 9:  # the list, the environment, the recipe, epoch 1, part of epoch 2
            raise OSError(28, "No space left on device")
        real(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", filling_up)
        with pytest.raises(StorageError, match=r"no space left on the device to write .*runs/full/"):
            trained_on(data, "full", epochs=3)
    full = Run(data.parent / "runs" / "full")
    Classifier.load(full.best)
    Classifier.load(full.last)
    resume("full", runs=data.parent / "runs")
    assert weights(full) == weights(whole)


def test_a_photo_gone_bad_stops_by_name(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    real = run.new_run

    def spoil(root: Path, name: str | None) -> Run:
        (data / "train" / "disc" / "disc000.png").write_text("text")
        return real(root, name)

    monkeypatch.setattr(run, "new_run", spoil)
    with pytest.raises(
        PhotoError, match=r"disc000.png cannot be used, it is not an image that Pillow can read: restore it, and"
    ):
        trained_on(data)


def test_torchs_own_generator_is_left_alone(data: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    trained_on(data, epochs=1)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["bn_googlenet", "googlenet"])
@pytest.mark.parametrize("size", [32, 96, 224])
def test_the_classic_recipe_trains_at_any_size(tmp_path: Path, network: str, size: int) -> None:
    write_photos(tmp_path / "data" / "train", each=4)
    write_photos(tmp_path / "data" / "val", each=2, first=50)
    result = train(
        tmp_path / "data", recipe="classic", runs=tmp_path / "runs", network=network, size=size, epochs=1, batch_size=6
    )
    assert result.epochs == 1
    assert 0 <= result.val_top1 <= 1


def test_ctrl_c_before_the_first_step_says_how_to_go_on(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop does not listen yet, and the state is saved."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(Interrupted) as error:
        patch.setattr(loop, "fit", interrupted)
        trained_on(data)
    assert error.value.message == (
        f"interrupted between two steps, and saved; go on with: bnlab.resume('run', runs='{data.parent}/runs')"
    )
    assert resume("run", runs=data.parent / "runs").epochs == 2
