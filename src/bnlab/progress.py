"""How long work reports its progress. The command line draws it; a library call is silent unless given a Progress."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


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
