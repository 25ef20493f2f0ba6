"""`bnlab train`: documents, resuming, what stops it, and --find-lr."""

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from bnlab.commands.train import run
from bnlab.errors import UsageError
from bnlab.options import TrainOptions
from bnlab.progress import NullProgress
from bnlab.runs import Run
from bnlab.training import lr_finder
from bnlab.training.state import LossNotFiniteError
from tests.conftest import QUICK, Outcome

Command = Callable[..., Outcome]


def test_the_document_and_the_last_line(bnlab: Command, data: Path) -> None:
    done = bnlab("train", data, *QUICK, "--epochs", 2, "--name", "a", "--json")
    document = json.loads(done.out)
    assert list(document) == ["run", "best", "epochs", "val_top1", "seconds", "frozen", "seen_in_training"]
    assert (document["run"], document["epochs"], document["best"]) == ("runs/a", 2, "runs/a/best.safetensors")
    with Path("runs/a/metrics.csv").open(newline="") as file:
        accuracies = [float(row["val_top1"]) for row in csv.DictReader(file)]
    assert len(accuracies) == 2
    assert document["val_top1"] == pytest.approx(max(accuracies), abs=1e-6)
    assert "epoch 2/2" in done.err
    shown = bnlab("train", "--resume")
    assert shown.out.startswith(f"best val accuracy {document['val_top1']:.1%} (95% interval ")
    assert shown.out.splitlines()[-1].endswith("Next: bnlab predict runs/a/best.safetensors PHOTO")


def test_resuming(bnlab: Command, run_copy: Path) -> None:
    done = bnlab("train", "--resume")
    assert done.status == 0
    assert "run runs/train is complete: 2 of 2 epochs" in done.err
    assert bnlab("train", "--resume", "--workers", 2, "--device", "cpu").status == 0
    assert "did you mean 'train'?" in bnlab("train", "--resume", "--name", "trian").complaint


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        (("--strict",), "out --strict"),
        (("--find-lr",), "out --find-lr"),
        (("--recipe", "classic"), "out --recipe"),
        (("--set", "size=64"), "size out"),
    ],
)
def test_a_resume_changes_no_result(bnlab: Command, run_copy: Path, extra: tuple[object, ...], what: str) -> None:
    done = bnlab("train", "--resume", *extra)
    assert done.status == 2
    assert f"leave {what}" in done.complaint


def test_a_longer_training_and_moved_photos(bnlab: Command, run_copy: Path, trained: Path) -> None:
    complaint = bnlab("train", "--resume", "--epochs", 3).complaint
    assert complaint.startswith("run runs/train has the schedule one-cycle, ")
    assert complaint.endswith(": bnlab train DATA --init runs/train/last.safetensors --epochs 1")
    data = trained.parents[1] / "data"
    shutil.copytree(data, "moved")
    assert bnlab("train", "moved", "--resume").status == 0
    assert json.loads((run_copy / "data.json").read_text()) == {"root": str(data), "from_run": "../../moved"}
    assert "there is no folder nowhere" in bnlab("train", "nowhere", "--resume").complaint
    complaint = bnlab("train", "moved/val", "--resume").complaint
    assert f"in {Path('moved/val').absolute()} 36 photos cannot be read" in complaint


def test_a_damaged_environment_does_not_stop_a_resume(bnlab: Command, run_copy: Path) -> None:
    (run_copy / "environment.json").write_text("{")
    done = bnlab("train", "--resume")
    assert done.status == 0
    assert "warning: " in done.err
    assert "processor" in done.err


def test_a_run_in_use_and_a_name_that_is_taken(bnlab: Command, run_copy: Path, data: Path) -> None:
    with Run(Path("runs/train")).locked():
        complaint = bnlab("train", "--resume").complaint
        assert complaint.startswith("run runs/train is in use by another training: ")
        assert "pass another name" in complaint
        complaint = bnlab("train", data, *QUICK, "--name", "train").complaint
        assert complaint.startswith("run runs/train exists already: ")
        assert "--resume --name train" in complaint


def test_a_diverged_training_is_status_1(bnlab: Command, data: Path) -> None:
    done = bnlab("train", data, *QUICK, "--network", "small_inception", "--learning-rate", 1e8, "--epochs", 3)
    assert done.status == 1
    assert "try learning_rate=" in done.complaint


@pytest.mark.parametrize("name", ["clash", "n" * 300])
def test_a_run_folder_that_cannot_be_made(bnlab: Command, data: Path, name: str) -> None:
    Path("runs").mkdir()
    Path("runs/clash").write_text("mine")
    done = bnlab("train", data, *QUICK, "--name", name)
    assert done.complaint.startswith(f"runs/{name} cannot be written (")
    assert done.status == 2
    assert Path("runs/clash").read_text() == "mine"


def test_a_link_to_nowhere_is_refused_at_once(bnlab: Command, data: Path) -> None:
    """For example a scratch disk that is not mounted."""
    Path("runs").symlink_to("/nonexistent/scratch")
    assert bnlab("train", data, *QUICK).complaint.startswith("runs cannot be written (File exists): ")


def test_without_data_nothing_is_trained() -> None:
    with pytest.raises(UsageError, match=r"DATA is missing: .*--resume"):
        run(TrainOptions(), NullProgress())


def test_finding_a_learning_rate(bnlab: Command, data: Path, tmp_path: Path) -> None:
    small = (*QUICK, "--network", "bn_mlp")
    done = bnlab("train", data, *small, "--find-lr", "--patience", 1, "--time", "20m")
    assert done.status == 0
    named = [line.split()[1] for line in done.err.splitlines() if line.startswith("warning: ")]
    assert sorted(named) == ["learning_rate", "patience", "time"]
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"find-lr"}
    folder = tmp_path / "runs/find-lr"
    assert {path.name for path in folder.iterdir()} == {"find-lr.png", "find-lr.csv"}
    with Image.open(folder / "find-lr.png") as picture:
        assert picture.width > 500
    with (folder / "find-lr.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "learning_rate", "loss", "smoothed_loss"]
    assert 20 < len(rows) <= 200
    assert float(rows[0]["learning_rate"]) == 1e-5

    again = bnlab("train", data, *small, "--find-lr", "--name", "twice", "--json")
    document = json.loads(again.out)
    assert (tmp_path / "runs/twice/find-lr.csv").read_bytes() == (folder / "find-lr.csv").read_bytes()
    assert (document["steps"], document["photos"], document["classes"]) == (len(rows), 24, 3)
    rate = document["suggested"]  # these shapes are learned at a rate near 0.02 (tests/training/test_run.py)
    assert 1e-3 < rate < 1
    assert done.out.splitlines()[-1].startswith("runs/find-lr/find-lr.png shows it.")
    assert f"bnlab train {data} --learning-rate {rate:g} and the other options" in done.out.splitlines()[-1]
    assert bnlab("train", data, "--find-lr", "--name", "twice").complaint.startswith("run runs/twice exists already: ")
    assert "DATA is missing" in bnlab("train", "--find-lr").complaint


def test_a_loss_that_does_not_fall_gives_no_suggestion(
    bnlab: Command, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lr_finder, "train_step", lambda *_: (torch.tensor(1.5), torch.tensor(0)))
    done = bnlab("train", data, *QUICK, "--find-lr")
    assert done.status == 0
    assert "suggested: none (the loss never fell by more than its noise" in done.out
    assert "It suggests none" in done.out.splitlines()[-1]


def test_a_loss_that_is_not_finite_from_the_start(bnlab: Command, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_finite(*_: object) -> None:
        raise LossNotFiniteError(math.nan, 0)

    monkeypatch.setattr(lr_finder, "train_step", not_finite)
    done = bnlab("train", data, *QUICK, "--find-lr")
    assert done.status == 1
    assert "not finite before any step" in done.complaint
    assert "the file in init" in done.complaint
