import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bnlab.errors import OutOfMemoryError, PhotoError
from bnlab.lab.processes import Job, run_jobs


class Counted:
    """A task that adds up."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def advance(self, count: int = 1, **values: float) -> None:
        self.steps.append(count)


def write(path: Path, tell: Callable[[int], None]) -> None:
    path.write_text(str(os.getpid()))
    tell(2)
    tell(100)  # more than it said it has


def refuse(tell: Callable[[int], None]) -> None:
    raise PhotoError("a.png", "it is red", "take another")


def die(tell: Callable[[int], None]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("processes", [0, 2])
def test_jobs_are_done_and_told(tmp_path: Path, processes: int) -> None:
    task = Counted()
    run_jobs([Job(write, (tmp_path / str(i),), 5) for i in range(3)], processes=processes, task=task)
    assert sum(task.steps) == 15
    owners = {int((tmp_path / str(i)).read_text()) for i in range(3)}
    assert (owners == {os.getpid()}) == (processes == 0)
    with pytest.raises(PhotoError, match=r"^a.png cannot be used, it is red: take another$"):
        run_jobs([Job(refuse, (), 1)] * 2, processes=processes, task=task)


def test_a_killed_process_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutOfMemoryError, match=r"one of 2 processes was killed.*: try fewer --processes"):
        run_jobs([Job(die, (), 1)] * 2, processes=2, task=Counted())


WAITING = """
import sys, time
from pathlib import Path
from bnlab.lab.processes import Job, run_jobs
sys.path.insert(0, {here!r})
from waiting import slow
if __name__ == "__main__":
    jobs = [Job(slow, (Path({folder!r}) / str(i),), 1) for i in range(4)]
    try:
        run_jobs(jobs, processes=2, task=None)
    except KeyboardInterrupt:
        print("stopped")
"""
SLOW = """
import time
def slow(folder, tell):
    folder.mkdir()
    (folder / "began").touch()
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        (folder / "saved").touch()
        raise
"""


LISTENING = """
import signal, time
def slow(folder, tell):
    folder.mkdir()
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    (folder / "began").touch()
    while not heard:
        time.sleep(0.05)
    signal.signal(signal.SIGTERM, before)
    (folder / "saved").touch()
    raise KeyboardInterrupt
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("job", [SLOW, LISTENING], ids=["stopped", "listens itself"])
def test_a_request_to_stop_reaches_the_processes(tmp_path: Path, job: str) -> None:
    """A kill of the first process alone, as a cluster's scheduler sends it: the others save and end, too."""
    (tmp_path / "waiting.py").write_text(job)
    script = tmp_path / "main.py"
    script.write_text(
        "import signal\nsignal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        + WAITING.format(here=str(tmp_path), folder=str(tmp_path))
    )
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*/began"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert said == "stopped\n"
    assert len(list(tmp_path.glob("*/saved"))) == len(list(tmp_path.glob("*/began"))) == 2
