"""Jobs in processes of their own, which tell how far they are, and stop when they are asked to."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from queue import Empty
from types import FrameType
from typing import Any

from bnlab.errors import OutOfMemoryError
from bnlab.progress import Task

_TELL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """A function of a module, to be called with its arguments and with whom to tell that so many steps are done."""

    do: Callable[..., None]
    arguments: tuple[Any, ...]
    steps: int

    def __call__(self, tell: Callable[[int], None]) -> None:
        """Do it; of its steps as many are told as it said it has."""
        left = self.steps

        def told(steps: int) -> None:
            nonlocal left
            steps = min(steps, left)
            left -= steps
            tell(steps)

        self.do(*self.arguments, told)
        told(left)


def run_jobs(jobs: Sequence[Job], *, processes: int, task: Task) -> None:
    """Do all jobs, so many at a time, the longest first; 0: one after the other, in this process.

    Raises:
        KeyboardInterrupt: Ctrl-C, or a request to stop, which the jobs were passed on, once each.
        OutOfMemoryError: a process was killed.
        Exception: what a job raised; those that had begun were stopped.
    """
    if processes == 0 or len(jobs) < 2:
        for job in jobs:
            job(task.advance)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process that has used torch may hang
    queue = context.Queue()
    longest_first = sorted(jobs, key=lambda job: -job.steps)
    with ProcessPoolExecutor(min(processes, len(jobs)), context, _begin, (queue,)) as pool:
        waiting: set[Future[None]] = {pool.submit(_do, job) for job in longest_first}
        try:
            while waiting:
                done, waiting = wait(waiting, _TELL_SECONDS, FIRST_COMPLETED)
                _drain(queue, task)
                for future in done:
                    future.result()
        except BaseException as error:
            running = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise OutOfMemoryError(
                    f"one of {len(running)} processes was killed, most likely for want of memory",
                    "try fewer --processes",
                ) from None
            raise
    _drain(queue, task)


def _drain(queue: Any, task: Task) -> None:
    while True:
        try:
            task.advance(queue.get_nowait())
        except Empty:
            return


# The rest is of the processes.

_queue: Any = None
_stopping = _working = False


def _begin(queue: Any) -> None:
    """A process begins: only the first process stops it, by SIGTERM."""
    global _queue  # noqa: PLW0603 (a process of a pool is given what it needs once)
    from bnlab.machine import tune_allocator

    tune_allocator()
    _queue = queue
    signal.signal(signal.SIGTERM, _stop)
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # out of reach of the terminal's Ctrl-C, which the first process passes on
    threading.Thread(target=_stop_with_parent, daemon=True).start()


def _stop(number: int, frame: FrameType | None) -> None:
    global _stopping  # noqa: PLW0603
    _stopping = True
    if _working:
        raise KeyboardInterrupt


def _stop_with_parent() -> None:
    """A process whose parent was killed would else wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _do(job: Job) -> None:
    global _stopping, _working  # noqa: PLW0603
    tell = _Teller()
    _working = True
    try:
        if _stopping:  # a job that was on its way already
            raise KeyboardInterrupt
        job(tell)
    except KeyboardInterrupt:  # of a job that listens itself, as a training does, to end with the step
        _stopping = True
        raise
    finally:
        _working = False
        tell.flush()


class _Teller:
    """Tells the first process, not too often."""

    def __init__(self) -> None:
        self.steps, self.at = 0, time.monotonic()

    def __call__(self, steps: int) -> None:
        self.steps += steps
        if time.monotonic() - self.at > _TELL_SECONDS:
            self.flush()

    def flush(self) -> None:
        _queue.put(self.steps)
        self.steps, self.at = 0, time.monotonic()
