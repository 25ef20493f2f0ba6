"""Runs jobs in worker processes. They report their progress, and stop in order when they are asked to.

Why not joblib: its loky backend kills its workers on an interruption, so that no training could save a checkpoint; the
workers of a killed parent go on with the jobs that it had queued; and a running job has no way to report progress.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from types import FrameType
from typing import Any

from bnlab.errors import OutOfMemoryError
from bnlab.progress import Task

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """A call of `do(*arguments, report_steps)`, where `do` is a function of a module."""

    do: Callable[..., None]
    arguments: tuple[Any, ...]
    steps: int

    def __call__(self, report_steps: Callable[[int], None]) -> None:
        """Run the job. Exactly `steps` steps are reported in the end, however many `do` reports."""
        left = self.steps

        def report(steps: int) -> None:
            nonlocal left
            steps = min(steps, left)
            left -= steps
            report_steps(steps)

        self.do(*self.arguments, report)
        report(left)


def run_jobs(jobs: Sequence[Job], *, processes: int, task: Task) -> None:
    """Run all jobs in so many processes, the longest first. With 0 processes, run them in turn in this process.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM. The running jobs got a SIGTERM each and have ended.
        OutOfMemoryError: the system killed a process.
        Exception: what a job raised; the other running jobs were stopped.
    """
    if processes == 0 or len(jobs) < 2:
        for job in jobs:
            job(task.advance)
        return
    processes = min(processes, len(jobs))
    context = multiprocessing.get_context("spawn")  # a fork of a process that has used torch may hang
    counter, counted = context.Value("q"), 0
    with ProcessPoolExecutor(processes, context, _start_worker, (counter,)) as pool:
        pending: set[Future[None]] = {pool.submit(_run, job) for job in sorted(jobs, key=lambda job: -job.steps)}
        try:
            while pending:
                done, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
                steps = counter.get_obj().value  # without the lock, which a killed worker may hold
                task.advance(steps - counted)
                counted = steps
                for future in done:
                    future.result()
        except BrokenProcessPool:  # the pool has sent the other workers a SIGTERM
            raise OutOfMemoryError(
                f"one of {processes} processes was killed, most likely because memory ran out", "try fewer processes"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


# What follows runs in the workers.

_counter: Any = None  # of the steps of all workers
_stop_requested = False
_idle = threading.Event()


def _start_worker(counter: Any) -> None:
    """Prepare a worker, which is stopped by a SIGTERM of its parent only, or by its parent's end."""
    global _counter  # noqa: PLW0603 (a pool passes objects that are shared to its initializer only)
    from bnlab.machine import tune_allocator

    tune_allocator()
    _counter = counter
    _idle.set()
    signal.signal(signal.SIGTERM, _request_stop)
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # so that Ctrl-C in the terminal reaches the parent alone, which then stops the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _request_stop(number: int, frame: FrameType | None) -> None:
    global _stop_requested  # noqa: PLW0603
    _stop_requested = True


def _end_with_parent() -> None:
    """Stop the running job, then the process, once the parent has ended, even if it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    _idle.wait()
    os._exit(1)


def _run(job: Job) -> None:
    _idle.clear()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt
    try:
        if _stop_requested:  # this job was queued already
            raise KeyboardInterrupt
        job(_report_steps)
    except KeyboardInterrupt:
        _request_stop(signal.SIGTERM, None)
        raise
    finally:
        signal.signal(signal.SIGTERM, _request_stop)
        _idle.set()


def _report_steps(steps: int) -> None:
    with _counter.get_lock():
        _counter.value += steps
