"""The files of a run, what it says, and how it stops."""

import os
import shutil
import signal
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from bnlab import Classifier
from bnlab.classifier.evaluate import evaluate
from bnlab.classifier.file import read_classifier
from bnlab.data.dataset import open_evaluation_data
from bnlab.errors import DataError, DivergedError, Interrupted, PhotoError
from bnlab.files import read_csv
from bnlab.progress import NullProgress, Task
from bnlab.runs import Run
from bnlab.training import loop, validate
from tests.training.test_run import files, metrics, resumed, trained_on


def test_a_run_folder_has_all_files(trained: Path) -> None:
    run = Run(trained)
    names = {p.name for p in trained.iterdir()} - {".lock"}
    assert names == {
        "recipe.yaml", "split.csv", "metrics.csv", "health.csv", "best.safetensors", "last.safetensors", "state.pt",
        "environment.json", "report.html", "tensorboard", "data.json",
    }  # fmt: skip
    rows = metrics(run)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    _, card = read_classifier(run.best)
    best = max(rows, key=lambda row: (float(row["val_top1"]), -float(row["val_loss"])))
    assert card.metrics["epoch"] == int(best["epoch"])
    assert (card.metrics["split"], card.metrics["n"], card.metrics["top1"]) == ("val", 12, float(best["val_top1"]))
    assert card.classes == ("disc", "ring", "stripes")
    health = list(read_csv(run.health))
    assert {"name", "effective_batch", "mean_off", "dead"} <= health[0].keys()
    assert len(health) == sum(name.endswith("running_mean") for name in read_classifier(run.last)[0])


def test_validation_agrees_with_the_file_that_is_kept(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probabilities of the validation and those of the file, whatever the batch size: within 1e-5."""
    validated = []
    real = loop.record_validation
    monkeypatch.setattr(
        loop, "record_validation", lambda s, row, v: (validated.append(v.evaluation), real(s, row, v))[1]
    )
    result = trained_on(data, epochs=1)
    (found,) = validated
    split, photos = open_evaluation_data(data, "val")
    classifier = Classifier.load(result.run.last)
    for batch_size in (1, 64):
        after = evaluate(classifier, photos, split, batch_size=batch_size)
        assert after.paths == found.paths
        assert abs(after.probabilities - found.probabilities).max() < 1e-5
        for prediction, row in zip(
            classifier.predict(found.paths, batch_size=batch_size), found.probabilities, strict=True
        ):
            predicted = {c.label: c.probability for c in prediction.top}
            assert [predicted[label] for label in classifier.classes] == pytest.approx(row.tolist(), abs=1e-5)


def test_photos_that_go_bad_stop_a_training_by_name(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of train, and those of val: epochs must stay comparable, so none is left out silently."""
    real = loop.record_validation

    def spoil(*arguments: Any) -> object:
        (data / "val" / "ring" / "ring100.png").write_text("text")
        return real(*arguments)

    monkeypatch.setattr(loop, "record_validation", spoil)
    with pytest.raises(PhotoError) as error:
        trained_on(data, cache="none")
    assert error.value.path == f"{data}/val/ring/ring100.png"
    assert f"bnlab.resume('run', runs='{data.parent}/runs')" in error.value.remedy

    (data / "train" / "disc" / "disc000.png").write_text("text")
    shutil.copy(data / "val" / "ring" / "ring101.png", data / "val" / "ring" / "ring100.png")
    with pytest.raises(DataError, match=r"2 photos have other content \(.*disc000\.png, .*ring100\.png\): restore"):
        resumed(data.parent)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_a_diverged_training_stops_with_its_learning_rate(data: Path) -> None:
    remedy = r": try learning_rate=3\.3e\+05, or a network with batch normalisation$"
    with pytest.raises(DivergedError, match=r"step \d+ \(epoch 1\), at a learning rate of \S+" + remedy):
        trained_on(data, network="small_inception", learning_rate=1e6, epochs=3)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_a_normalised_network_that_diverges_is_not_advised_to_be_normalised(data: Path) -> None:
    with pytest.raises(DivergedError, match=r"at a learning rate of \S+: try learning_rate=3\.3e\+29$"):
        trained_on(data, network="bn_small_inception", learning_rate=1e30, epochs=1)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_a_loss_that_is_not_finite_at_the_first_step_is_not_the_fault_of_the_learning_rate(data: Path) -> None:
    with pytest.raises(DivergedError, match=r"at step 1 \(epoch 1\).*: check mean, std and the file in init$"):
        trained_on(data, network="small_inception", std=(1e-40, 1e-40, 1e-40), epochs=1)


class Impatient(NullProgress):
    """Presses Ctrl-C when the fifth batch is done."""

    batches = 0

    def task(self, title: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Task]:
        return nullcontext(self if title == "training" else NullProgress())

    def advance(self, count: int = 1, **_: float) -> None:
        self.batches += 1
        if self.batches == 5:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_saves_and_says_how_to_go_on(data: Path) -> None:
    """With a network that is initialised on its first batch, which a resume does not repeat."""
    options = {"network": "small_inception", "lsuv_init": True, "epochs": 3}
    whole = trained_on(data, "whole", **options).run
    with pytest.raises(Interrupted) as stop:
        trained_on(data, "stopped", progress=Impatient(), **options)
    assert "after step 5, and saved" in str(stop.value)
    assert str(stop.value).endswith(f"bnlab.resume('stopped', runs='{data.parent}/runs')")
    assert files(whole) == files(resumed(data.parent, "stopped").run)


def test_ctrl_c_before_the_first_step_says_how_to_go_on(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop does not record signals yet, and the state is saved."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with (
        monkeypatch.context() as patch,
        pytest.raises(Interrupted, match=r"checkpoint; resume with: bnlab\.resume"),
    ):
        patch.setattr(loop, "fit", interrupted)
        trained_on(data, epochs=1)
    assert resumed(data.parent).epochs == 1


def test_seconds_count_validation(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead, real = 0, validate.evaluate

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return time.monotonic() + ahead

    def slow(*arguments: Any, **options: Any) -> object:
        nonlocal ahead
        ahead += 1000
        return real(*arguments, **options)

    monkeypatch.setattr(loop, "time", Clock)
    monkeypatch.setattr(validate, "evaluate", slow)
    result = trained_on(data, epochs=2, recalibration_images=0)
    assert 2000 <= result.seconds < 3000
    assert result.rows[0]["images_per_second"] > 24 / 1000  # type: ignore[operator]
