from collections.abc import Callable
from pathlib import Path

from bnlab.runs import Run
from tests.conftest import QUICK, Outcome

Command = Callable[..., Outcome]
VERBS = ("split", "train", "evaluate", "predict", "demo", "net", "import")


def test_a_run_in_use(bnlab: Command, data: Path) -> None:
    bnlab("train", data, *QUICK, "--epochs", 1)
    with Run(Path("runs/train")).locked():
        assert bnlab("train", "--resume").complaint == (
            "run runs/train is in use by another training: wait for it, or take another --name"
        )
        assert bnlab("train", data, *QUICK, "--name", "train").complaint == (
            "run runs/train exists already: take another --name, or go on with it: --resume --name train"
        )


def test_a_diverged_training_is_status_1(bnlab: Command, data: Path) -> None:
    done = bnlab("train", data, *QUICK, "--network", "small_inception", "--learning-rate", 1e8, "--epochs", 3)
    assert done.status == 1
    assert "--learning-rate" in done.complaint


def test_a_spoilt_environment_stops_no_resume(bnlab: Command, data: Path) -> None:
    bnlab("train", data, *QUICK, "--epochs", 1)
    Path("runs/train/environment.json").write_text("{")
    done = bnlab("train", "--resume")
    assert done.status == 0
    assert "this run began with other processor" in done.err


def test_places_that_cannot_be_written_to(bnlab: Command, data: Path, photos: Path, trained: Path) -> None:
    Path("afile").write_text("mine")
    Path("runs").mkdir()
    Path("runs/clash").write_text("mine")
    best, photo = trained / "best.safetensors", data / "val/ring/ring100.png"
    for arguments, message in (
        (("predict", best, photo, "--csv", "afile/p.csv"), "afile/p.csv cannot be written ("),
        (("train", data, *QUICK, "--name", "clash"), "runs/clash cannot be written (Not a directory): give a place"),
        (("train", data, *QUICK, "--name", "n" * 300), f"runs/{'n' * 300} cannot be written (File name too long)"),
        (("split", photos, "--into", "/proc/x", "--val", 0.3), "/proc/x cannot be written (No such file or directory)"),
    ):
        done = bnlab(*arguments)
        assert done.complaint.startswith(message)
        assert done.status == 2


def test_a_link_to_nowhere_is_refused_at_once(bnlab: Command, data: Path) -> None:
    """A scratch disk that is not mounted."""
    Path("runs").symlink_to("/nonexistent/scratch")
    assert (
        bnlab("train", data, *QUICK).complaint == "runs cannot be written (File exists): give a place you may write to"
    )
