"""How long work reports its progress, and what it warns of.

The command line draws both. From Python, nothing draws progress unless a Progress is passed; what is warned of goes to
the logger `bnlab` as well (warnings as WARNING, notes as INFO), and into the `warnings` of a command's result.
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

LOG = logging.getLogger("bnlab")


class Task(Protocol):
    """One stretch of work."""

    def advance(self, count: int = 1, total: int | None = None, **values: float) -> None:
        """Report that `count` more units are done; `values` (such as the loss) are shown next to the bar.

        `total` replaces the number of units, if it has changed.
        """


class Progress(Protocol):
    """Receives progress, notes and warnings. Only implementations in the command line print."""

    def task(self, title: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Task]:
        """Begin a stretch of `total` units, `done` of which were done earlier."""

    def note(self, text: str) -> None:
        """Report something worth knowing."""

    def warn(self, text: str) -> None:
        """Report something that may be wrong."""


class NullProgress:
    """Prints nothing, and keeps the warnings in `warnings`. It is its own task."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def task(self, title: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Task]:
        return nullcontext(self)

    def advance(self, count: int = 1, total: int | None = None, **values: float) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        self.warnings.append(text)


class LoggedProgress(NullProgress):
    """Forwards everything to `progress` (default: nothing), logs notes and warnings, and keeps the warnings.

    A command begins with one, so that each warning is logged once. Threads may share it.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        super().__init__()
        self.progress = progress or NullProgress()

    def task(self, title: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Task]:
        return self.progress.task(title, total, unit, done)

    def note(self, text: str) -> None:
        LOG.info("%s", text)
        self.progress.note(text)

    def warn(self, text: str) -> None:
        super().warn(text)
        LOG.warning("%s", text)
        self.progress.warn(text)
