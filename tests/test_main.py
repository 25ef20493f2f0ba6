"""The program as a process: exit status, closed streams, signals."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bnlab.__main__ import main
from bnlab.commands import train
from bnlab.errors import DivergedError, Interrupted, UsageError
from bnlab.options import TrainOptions
from bnlab.progress import Progress
from tests.conftest import QUICK, Outcome

Command = Callable[..., Outcome]


def split_words(photos: Path) -> list[str]:
    (photos / "disc" / "bad.jpg").write_text("text")  # which prints a warning to stderr
    return [sys.executable, "-m", "bnlab", "split", str(photos), "--into", str(photos.parent / "data"), "--val", "0.3"]


def test_a_closed_pipe_is_not_an_error(photos: Path) -> None:
    """As in `bnlab split ... | head -0`: the reader ends before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(split_words(photos), stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == 1
    assert "bad.jpg" in done.stderr


def test_work_continues_without_a_reader_of_its_messages(photos: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(split_words(photos), stdout=subprocess.PIPE, stderr=writing, text=True, check=False)
    os.close(writing)
    assert done.returncode == 0
    assert "Next: bnlab train" in done.stdout


def test_a_full_memory_is_one_line(bnlab: Command, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("bnlab.commands.split.split_folder", full)
    done = bnlab("split", photos, "--into", "data")
    assert (done.status, done.complaint[:15]) == (2, "out of memory: ")


@pytest.mark.parametrize("closing", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_not_an_error(photos: Path, closing: str) -> None:
    command = f"{shlex.join(split_words(photos))} {closing}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert (photos.parent / "data" / "split.csv").exists()
    assert "Traceback" not in done.stderr


def test_names_that_a_terminal_cannot_show_are_escaped(photos: Path) -> None:
    (photos / "ring").rename(photos / "百合")
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(split_words(photos), capture_output=True, encoding="cp1252", env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert r"\u767e\u5408" in done.stdout


def test_the_time_of_a_training_counts_from_the_start_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the imports of the command line; a call from Python counts from itself."""
    began = []

    def run(options: TrainOptions, progress: Progress, since: float) -> None:
        began.append(since)
        raise UsageError("it was called", "look")

    monkeypatch.setattr(train, "run", run)
    words = ["train", "data", "--time", "9"]
    monkeypatch.setattr(sys, "argv", ["bnlab", *words])
    before = time.monotonic()
    assert main() == main(words) == 2
    assert before <= began[1] <= time.monotonic()
    assert began[0] == sys.modules["bnlab"]._imported < before


def test_ctrl_c_is_status_130(bnlab: Command, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bnlab.commands import split

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(split, "write_split", interrupted)
    done = bnlab("split", photos, "--into", "data", "--val", 0.3)
    assert done.status == 130
    assert done.complaint.startswith("interrupted")


def test_ctrl_c_in_a_training_says_how_to_continue(data: Path) -> None:
    """A terminal sends SIGINT to the process."""
    words = [sys.executable, "-m", "bnlab", "train", "data", *map(str, QUICK), "--epochs", "500"]
    with subprocess.Popen(words, cwd=data.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            while not (data.parent / "runs/train/metrics.csv").exists() and process.poll() is None:
                time.sleep(0.02)  # until the loop runs, which receives signals even where the shell ignores SIGINT
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1].endswith("bnlab train --resume --name train")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (DivergedError("the loss became nan", "pass a smaller --learning-rate"), 1, "nan: pass a smaller"),
        (UsageError("a is b", "pass c"), 2, "a is b: pass c"),
        (PermissionError(13, "Permission denied"), 2, "Permission denied"),
        (Interrupted("saved; continue with X"), 130, "saved; continue with X"),
    ],
)
def test_each_error_has_its_status(
    bnlab: Command, photos: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, message: str
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("bnlab.commands.split.write_split", fails)
    done = bnlab("split", photos, "--into", "data", "--val", 0.3)
    assert (done.status, done.out) == (status, "")
    assert message in done.complaint
