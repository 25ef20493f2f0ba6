"""The screen: results on stdout; bars, notes and warnings on stderr. Nothing below the command line prints."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, TypeVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn
from rich.progress import Task as RichTask
from rich.text import Text

from bnlab.errors import Interrupted
from bnlab.progress import Task, TaskContext

S = TypeVar("S")
R = TypeVar("R")

_QUIET_SECONDS = 2.0  # without a terminal, work shorter than this is not mentioned
_FOREVER = 1e8
_LINE_SECONDS = 30.0  # and longer work gets a line this often


class Stopped(Exception):  # noqa: N818 (it is no error)
    """An interruption that has something to say, out of Typer's reach, which would swallow it."""


class _Stderr(Console):
    def on_broken_pipe(self) -> None:
        """Whoever read our messages has left; the work goes on without them."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


err = _Stderr(stderr=True, highlight=False, emoji=False)


def run_command(command: Callable[[S, Any], R], settings: S) -> R:
    """Run a command with its progress on the screen."""
    try:
        return command(settings, ScreenProgress(err))
    except Interrupted as interruption:
        raise Stopped(interruption.message) from None


def show_result(as_json: bool, document: Any, shown: RenderableType, last: str) -> None:
    """The result on stdout: one JSON document, or a table and where to go next."""
    try:
        if as_json:
            print(json.dumps(document, indent=2, allow_nan=False))  # noqa: T201
        else:
            width = None if sys.stdout.isatty() else 10_000  # a file or a pipe has no edge to fold paths at
            out = Console(highlight=False, emoji=False, width=width)
            with out.capture() as text:
                out.print(shown, markup=False, soft_wrap=isinstance(shown, str))
                if last:
                    out.print("\n" + last, markup=False, soft_wrap=True)
            sys.stdout.write(text.get())
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough; Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class ScreenProgress:
    """Draws bars on a terminal; in a log file writes a line now and then."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(24),
            TextColumn("{task.completed}/{task.total}"),
            _Rate(),
        )
        self.bars = Progress(*columns, console=console, transient=True)
        self.open = 0

    def task(self, title: str, total: int, unit: str, done: int = 0) -> TaskContext:
        """A bar, or lines in a log."""
        return (self._bar if self.console.is_terminal else self._lines)(title, total, unit, done)

    def note(self, text: str) -> None:
        """A line."""
        self.console.print(Text(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line that stands out."""
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


class _Rate(ProgressColumn):
    """Units a second, what is measured, how long still, and at what time it ends."""

    max_refresh = 0.25

    def render(self, task: RichTask) -> Text:
        """The text beside a bar."""
        parts = _measured(task.fields["values"])
        if task.speed:
            parts.append(f"{task.speed:.0f} {task.fields['unit']}/s")
        if task.time_remaining is not None and not task.finished:
            parts.append(_until(task.time_remaining))
        return Text("  ".join(parts), style="cyan")


class _Lines:
    def __init__(self, progress: ScreenProgress, title: str, total: int, unit: str, done: int) -> None:
        self.progress, self.title, self.total, self.unit = progress, title, total, unit
        self.before = self.done = done
        self.began = self.said = time.monotonic()

    def advance(self, count: int = 1, **values: float) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.said >= _LINE_SECONDS:
            self.said = now
            rate = (self.done - self.before) / (now - self.began)
            parts = [f"{self.title} {self.done}/{self.total}", *_measured(values), f"{rate:.0f} {self.unit}/s"]
            self.progress.note("  ".join([*parts, _until((self.total - self.done) / rate)]))

    def end(self) -> None:
        seconds = time.monotonic() - self.began
        if seconds >= _QUIET_SECONDS:
            self.progress.note(f"{self.title}: {self.done - self.before} {self.unit} in {seconds:.0f} s")


def _measured(values: Mapping[str, float]) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in values.items()]


def _until(seconds: float) -> str:
    if seconds > _FOREVER:
        return "years left"
    end = datetime.now() + timedelta(seconds=seconds)
    minutes, rest = divmod(round(seconds), 60)
    left = (
        f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
    )
    return f"{left} left, done at {end:%H:%M:%S}"
