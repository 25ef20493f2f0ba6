"""What a long piece of work tells whoever waits for it. The command line draws it; a library call stays silent."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol


class Task(Protocol):
    """One stretch of work."""

    def advance(self, count: int = 1, **values: float) -> None:
        """`count` more units are done; `values` (such as the loss) stand beside the bar."""


class Progress(Protocol):
    """Where work is announced. Implementations may print; nothing below the command line does."""

    def task(self, title: str, total: int, unit: str, done: int = 0) -> "TaskContext":
        """Begin a stretch of `total` units, `done` of them earlier, to be used in a `with`."""

    def note(self, text: str) -> None:
        """Say something worth knowing."""

    def warn(self, text: str) -> None:
        """Say something that may be wrong."""


class TaskContext(Protocol):
    """A context manager that gives a Task."""

    def __enter__(self) -> Task: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None: ...


class _SilentTask:
    def advance(self, count: int = 1, **values: float) -> None:
        pass


class NullProgress:
    """Says nothing; keeps the warnings in `warnings` for who wants to look."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    @contextmanager
    def _nothing(self) -> Iterator[Task]:
        yield _SilentTask()

    def task(self, title: str, total: int, unit: str, done: int = 0) -> TaskContext:
        """Begin a task nobody watches."""
        return self._nothing()

    def note(self, text: str) -> None:
        """Say nothing."""

    def warn(self, text: str) -> None:
        """Keep the warning."""
        self.warnings.append(text)
