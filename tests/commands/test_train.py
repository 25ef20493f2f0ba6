"""`bnlab train`: documents, resuming, and what stops it."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bnlab.commands.train import run
from bnlab.errors import UsageError
from bnlab.options import TrainOptions
from bnlab.progress import NullProgress
from bnlab.runs import Run
from tests.conftest import QUICK, Outcome

Command = Callable[..., Outcome]


def test_the_document_and_the_last_line(bnlab: Command, data: Path) -> None:
    done = bnlab("train", data, *QUICK, "--epochs", 2, "--name", "a", "--json")
    document = json.loads(done.out)
    assert list(document) == ["run", "best", "epochs", "val_top1", "seconds", "frozen"]
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
        (("--epochs", 3), "--epochs"),
        (("--strict",), "--strict"),
        (("--find-lr",), "--find-lr"),
        (("data",), "DATA"),
        (("--recipe", "classic"), "--recipe"),
        (("--set", "size=64"), "--size"),
    ],
)
def test_a_resume_changes_no_result(bnlab: Command, run_copy: Path, extra: tuple[object, ...], what: str) -> None:
    done = bnlab("train", "--resume", *extra)
    assert done.status == 2
    assert f"leave out {what}" in done.complaint


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
        assert "--name" in complaint
        complaint = bnlab("train", data, *QUICK, "--name", "train").complaint
        assert complaint.startswith("run runs/train exists already: ")
        assert "--resume --name train" in complaint


def test_a_diverged_training_is_status_1(bnlab: Command, data: Path) -> None:
    done = bnlab("train", data, *QUICK, "--network", "small_inception", "--learning-rate", 1e8, "--epochs", 3)
    assert done.status == 1
    assert "--learning-rate" in done.complaint


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
