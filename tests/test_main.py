import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import QUICK, Outcome

Command = Callable[..., Outcome]
VERBS = ("split", "train", "evaluate", "predict", "demo", "net", "import")


def test_a_closed_pipe_is_no_error(trained: Path) -> None:
    """As `bnlab predict ... | head -0`: the reader is gone before a word is written."""
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "bnlab", "predict", f"{trained}/best.safetensors", str(trained.parents[1] / "data")]
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_names_a_terminal_cannot_show(photos: Path) -> None:
    (photos / "disc").rename(photos / "百合")
    words = [sys.executable, "-m", "bnlab", "split", str(photos), "--into", str(photos.parent / "data"), "--val", "0.3"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(words, capture_output=True, encoding="cp1252", env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert r"\u767e\u5408" in done.stdout


def test_closed_streams_are_no_error(trained: Path) -> None:
    command = f"{sys.executable} -m bnlab predict {trained}/best.safetensors {trained.parents[1] / 'data'}"
    for closing in (">&-", "2>&-", ">&- 2>&-"):
        done = subprocess.run(f"{command} {closing}", shell=True, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_training_outlives_who_reads_its_messages(data: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "bnlab", "train", "data", *map(str, QUICK), "--epochs", "1"]
    done = subprocess.run(words, cwd=data.parent, stdout=subprocess.PIPE, stderr=writing, text=True, check=False)
    os.close(writing)
    assert done.returncode == 0
    assert done.stdout.startswith("best val accuracy")


def test_ctrl_c_is_status_130(bnlab: Command, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bnlab.commands import split

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(split, "write_split", interrupted)
    done = bnlab("split", photos, "--into", "data", "--val", 0.3)
    assert (done.status, done.complaint) == (130, "interrupted; every file is whole, as it was or as it should be")


def test_ctrl_c_in_a_training_says_how_to_go_on(data: Path) -> None:
    """As a terminal does it: SIGINT to the process."""
    words = [sys.executable, "-m", "bnlab", "train", "data", *map(str, QUICK), "--epochs", "500"]
    with subprocess.Popen(words, cwd=data.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not (data.parent / "runs/train/state.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1].endswith(", and saved; go on with: bnlab train --resume --name train")
    assert "Traceback" not in err
