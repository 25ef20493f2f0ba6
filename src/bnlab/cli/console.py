"""The screen: results on stdout; progress bars, notes and warnings on stderr. Only the command line prints."""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timedelta
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TaskID, TextColumn
from rich.progress import Task as RichTask
from rich.text import Text

from bnlab.progress import Task

_QUIET_SECONDS = 2.0  # without a terminal, shorter work is not mentioned
_LINE_SECONDS = 30.0  # and longer work gets a line this often
_LONGEST_SECONDS = 1e8  # a longer estimate of the time left is not shown


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
            sys.stdout.write(text.get())
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed stdout; without this, Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class ScreenProgress:
    """Draws bars on a terminal, and writes a line now and then to a log file."""

    def __init__(self, console: Console = err) -> None:
        self.console = console
        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), _RateAndEndColumn())
        self.bars = Progress(*columns, console=console, transient=True)
        self.open = 0

    def task(self, title: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Task]:
        return (self._bar if self.console.is_terminal else self._lines)(title, total, unit, done)

    def note(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(Text("warning: ", style="yellow") + Text(text), soft_wrap=True)

    @contextmanager
    def _bar(self, title: str, total: int, unit: str, done: int) -> Iterator[Task]:
        number = self.bars.add_task(title, total=total, completed=done, unit=unit, values={})
        self.open += 1
        self.bars.start()
        try:
            yield _Bar(self.bars, number)
        finally:
            self.open -= 1
            if not self.open:
                self.bars.stop()
            self.bars.remove_task(number)

    @contextmanager
    def _lines(self, title: str, total: int, unit: str, done: int) -> Iterator[Task]:
        lines = _Lines(self, title, total, unit, done)
        yield lines
        lines.end()


class _Bar:
    def __init__(self, bars: Progress, number: TaskID) -> None:
        self.bars, self.number = bars, number

    def advance(self, count: int = 1, **values: float) -> None:
        self.bars.update(self.number, advance=count, values=values)


class _RateAndEndColumn(ProgressColumn):
    """Measured values, units a second, time left, and the clock time of the end, which rich's columns do not have."""

    max_refresh = 0.25

    def render(self, task: RichTask) -> Text:
        parts = _measured(task.fields["values"])
        if task.speed:
            parts.append(f"{task.speed:.0f} {task.fields['unit']}/s")
        if task.time_remaining is not None and not task.finished:
            parts.append(_time_left(task.time_remaining))
        return Text("  ".join(parts), style="cyan")


class _Lines:
    def __init__(self, progress: ScreenProgress, title: str, total: int, unit: str, done: int) -> None:
        self.progress, self.title, self.total, self.unit = progress, title, total, unit
        self.before = self.done = done
        self.began = self.last_line = time.monotonic()

    def advance(self, count: int = 1, **values: float) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last_line >= _LINE_SECONDS:
            self.last_line = now
            rate = (self.done - self.before) / (now - self.began)
            parts = [f"{self.title} {self.done}/{self.total}", *_measured(values), f"{rate:.0f} {self.unit}/s"]
            self.progress.note("  ".join([*parts, _time_left((self.total - self.done) / rate)]))

    def end(self) -> None:
        seconds = time.monotonic() - self.began
        if seconds >= _QUIET_SECONDS:
            self.progress.note(f"{self.title}: {self.done - self.before} {self.unit} in {seconds:.0f} s")


def _measured(values: Mapping[str, float]) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in values.items()]


def _time_left(seconds: float) -> str:
    if seconds > _LONGEST_SECONDS:
        return "years left"
    left = timedelta(seconds=round(seconds))
    return f"{left} left, done at {datetime.now() + left:%H:%M:%S}"
