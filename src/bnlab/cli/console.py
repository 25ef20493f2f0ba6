"""The screen: results on stdout; progress bars, notes and warnings on stderr. Only the command line prints."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from math import ceil
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
from rich.progress import Task as RichTask
from rich.text import Text

from bnlab.progress import LOG, Task

_QUIET_SECONDS = 2.0  # without a terminal, shorter work is not mentioned
_LINE_SECONDS = 30.0  # and longer work gets a line this often
_LONGEST_SECONDS = 1e8  # a longer estimate of the time left is cut: it would overflow


class _Stderr(Console):
    def on_broken_pipe(self) -> None:
        """Continue without messages if the reader of stderr has closed it."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


err = _Stderr(stderr=True, highlight=False, emoji=False)


def show_result(as_json: bool, document: Any, shown: RenderableType, last: str) -> None:
    """Print the result on stdout: one JSON document; or a table, and a last line that says what to do next."""
    try:
        if as_json:
            print(json.dumps(document, indent=2, allow_nan=False))  # noqa: T201
        else:
            width = None if sys.stdout.isatty() else 10_000  # paths are not folded in a file or a pipe
            out = Console(highlight=False, emoji=False, width=width)
            with out.capture() as text:
                out.print(shown, markup=False, soft_wrap=isinstance(shown, str))
                if last:
                    out.print("\n" + last, markup=False, soft_wrap=True)
            lines = text.get().split("\n")
            sys.stdout.write("\n".join(lines if width is None else map(str.rstrip, lines)))  # tables pad their rows
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed stdout; without this, Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def only_the_screen() -> Iterator[None]:
    """Keep handlers of logging from printing what ScreenProgress prints already."""
    handler, propagate = logging.NullHandler(), LOG.propagate
    LOG.addHandler(handler)
    LOG.propagate = False
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.propagate = propagate


class ScreenProgress:
    """Draws bars on a terminal; writes a line now and then to anything else, such as a log file."""

    def __init__(self, console: Console = err) -> None:
        self.console = console
        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), _RateAndEndColumn())
        self.bars = Progress(
            *columns,
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=4 * _LINE_SECONDS,
        )

    @contextmanager
    def task(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        number = self.bars.add_task(title, total=total, completed=done, unit=unit, values={})
        task = _Task(self, self.bars.tasks[-1])
        self.bars.start()
        try:
            yield task
            task.end(done)
        finally:
            if len(self.bars.tasks) == 1:
                self.bars.stop()
            self.bars.remove_task(number)

    def note(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(Text("warning: ", style="yellow") + Text(text), soft_wrap=True)


class _Task:
    def __init__(self, progress: ScreenProgress, task: RichTask) -> None:
        self.progress, self.task = progress, task
        self.last_line = 0.0

    def advance(self, count: int = 1, total: int | None = None, **values: float) -> None:
        self.progress.bars.update(self.task.id, advance=count, total=total, values=values)
        seconds = self.task.elapsed or 0.0
        if self.progress.bars.disable and seconds - self.last_line >= _LINE_SECONDS:
            self.last_line = seconds
            done = f"{self.task.description} {self.task.completed:.0f}/{self.task.total:.0f}"
            self.progress.note("  ".join([done, *_state(self.task)]))

    def end(self, done_before: int) -> None:
        seconds = self.task.elapsed or 0.0
        if self.progress.bars.disable and seconds >= _QUIET_SECONDS:
            done = f"{self.task.completed - done_before:.0f} {self.task.fields['unit']}"
            self.progress.note(f"{self.task.description}: {done} in {seconds:.0f} s")


class _RateAndEndColumn(ProgressColumn):
    max_refresh = 0.25

    def render(self, task: RichTask) -> Text:
        return Text("  ".join(_state(task)), style="cyan")


def _state(task: RichTask) -> list[str]:
    """Measured values, units a second, time left, and the clock time of the end, which rich's columns do not have."""
    parts = [f"{name} {value:.4g}" for name, value in task.fields["values"].items()]
    speed = task.speed or 0.0  # None before the second advance
    if speed > 0:
        parts.append(f"{speed:.0f} {task.fields['unit']}/s")
    if speed > 0 and task.remaining is not None and not task.finished:
        left = timedelta(seconds=ceil(min(task.remaining / speed, _LONGEST_SECONDS)))
        parts.append(f"{left} left, done at {datetime.now() + left:%H:%M:%S}")
    return parts
