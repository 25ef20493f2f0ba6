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


class Counter:
    """A task that adds up the steps."""

    def __init__(self) -> None:
        self.steps = 0

    def advance(self, count: int = 1, **values: float) -> None:
        self.steps += count


def write(path: Path, report_steps: Callable[[int], None]) -> None:
    path.write_text(str(os.getpid()))
    report_steps(2)
    report_steps(100)  # more than the job has


def refuse(report_steps: Callable[[int], None]) -> None:
    raise PhotoError("a.png", "it is red", "take another")


def die(report_steps: Callable[[int], None]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("processes", [0, 2])
def test_all_jobs_run_and_report_exactly_their_steps(tmp_path: Path, processes: int) -> None:
    task = Counter()
    run_jobs([Job(write, (tmp_path / str(i),), 5) for i in range(3)], processes=processes, task=task)
    assert task.steps == 15
    owners = {int((tmp_path / str(i)).read_text()) for i in range(3)}
    assert (owners == {os.getpid()}) == (processes == 0)
    with pytest.raises(PhotoError, match=r"^a.png cannot be used, it is red: take another$"):
        run_jobs([Job(refuse, (), 1)] * 2, processes=processes, task=task)


def test_a_process_that_the_system_kills_is_an_error_with_a_remedy() -> None:
    with pytest.raises(OutOfMemoryError, match=r"one of 2 processes was killed.*fewer processes"):
        run_jobs([Job(die, (), 1)] * 2, processes=2, task=Counter())


MAIN = """
import signal, sys
from pathlib import Path
from bnlab.lab.processes import Job, run_jobs
from bnlab.progress import NullProgress
from slow import slow
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    jobs = [Job(slow, (Path(sys.argv[1]), i), 1) for i in range(4)]
    try:
        with NullProgress().task("", 4, "") as task:
            run_jobs(jobs, processes=2, task=task)
    except KeyboardInterrupt:
        print("stopped")
"""
INTERRUPTED = """
import os, time
def slow(folder, i, report_steps):
    (folder / f"began{i}").write_text(str(os.getpid()))
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        (folder / f"saved{i}").touch()
        raise
"""
LISTENING = """
import os, signal, time
def slow(folder, i, report_steps):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    (folder / f"began{i}").write_text(str(os.getpid()))
    while not heard:
        time.sleep(0.05)
    signal.signal(signal.SIGTERM, before)
    (folder / f"saved{i}").touch()
    raise KeyboardInterrupt
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    ("job", "number"),
    [(INTERRUPTED, signal.SIGTERM), (LISTENING, signal.SIGTERM), (LISTENING, signal.SIGKILL)],
    ids=["SIGTERM", "SIGTERM, jobs listen as a training does", "SIGKILL"],
)
def test_a_signal_to_the_parent_alone_lets_the_jobs_save_and_ends_the_workers(
    tmp_path: Path, job: str, number: signal.Signals
) -> None:
    (tmp_path / "slow.py").write_text(job)
    (tmp_path / "main.py").write_text(MAIN)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "main.py", tmp_path], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    wait_for(lambda: len([path for path in tmp_path.glob("began*") if path.read_text()]) == 2)
    workers = [int(path.read_text()) for path in tmp_path.glob("began*")]
    parent.send_signal(number)
    output, _ = parent.communicate(timeout=60)
    assert output == ("stopped\n" if number == signal.SIGTERM else "")
    wait_for(lambda: not any(map(is_running, workers)))
    assert len(list(tmp_path.glob("saved*"))) == 2
    assert len(list(tmp_path.glob("began*"))) == 2  # no queued job began


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("it did not happen in a minute")
