"""Run folders: what a training leaves, under which names, and that only one training writes to each."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from bnlab.errors import RunError, UsageError, did_you_mean, printable, quoted
from bnlab.files import storage_errors

RUNS = Path("runs")
# What a training that was killed before its recipe stood may have left: nothing anyone would miss.
_BEFORE_IT_BEGINS = {".lock", "split.csv", "environment.json"}


@dataclass(frozen=True)
class Run:
    """A run folder and the files in it."""

    folder: Path

    @property
    def name(self) -> str:
        """Its own name, without the folder it lies in."""
        return self.folder.name

    @property
    def recipe(self) -> Path:
        """All settings, resolved."""
        return self.folder / "recipe.yaml"

    @property
    def split(self) -> Path:
        """Which photo was train, val or test."""
        return self.folder / "split.csv"

    @property
    def metrics(self) -> Path:
        """One row an epoch."""
        return self.folder / "metrics.csv"

    @property
    def best(self) -> Path:
        """The classifier of the best epoch."""
        return self.folder / "best.safetensors"

    @property
    def last(self) -> Path:
        """The classifier of the last epoch."""
        return self.folder / "last.safetensors"

    @property
    def state(self) -> Path:
        """What a resume needs."""
        return self.folder / "state.pt"

    @property
    def environment(self) -> Path:
        """Where it was trained."""
        return self.folder / "environment.json"

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.folder / "report.html"

    @property
    def events(self) -> Path:
        """TensorBoard's."""
        return self.folder / "tensorboard"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other trainings out while the block runs. The lock goes with the process, however it ends.

        Raises:
            RunError: another training has it.
        """
        lock = FileLock(self.folder / ".lock")
        with storage_errors(self.folder):
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise RunError(
                    f"run {printable(self.folder)} is in use by another training", "wait for it, or take another --name"
                ) from None
        try:
            yield
        finally:
            lock.release()


def new_run(root: Path, name: str | None, stem: str = "train") -> Run:
    """Make the folder of a new run: `root/name`, or the first free of `stem`, `stem2`, ... where no name is given.

    Raises:
        RunError: the name is taken.
        UsageError: the name is a path.
        StorageError: the folder cannot be made.
    """
    if name is not None:
        run = Run(_named(root, name))
        with storage_errors(run.folder):
            run.folder.mkdir(parents=True, exist_ok=True)
        if any(path.name not in _BEFORE_IT_BEGINS and path.suffix != ".part" for path in run.folder.iterdir()):
            goes_on = f", or go on with it: --resume --name {quoted(name)}" if run.recipe.is_file() else ""
            raise RunError(f"run {printable(run.folder)} exists already", f"take another --name{goes_on}")
        return run
    number = 1
    while True:
        folder = root / (stem if number == 1 else f"{stem}{number}")
        with storage_errors(folder):
            try:
                folder.mkdir(parents=True)
                return Run(folder)
            except FileExistsError:
                number += 1


def find_run(root: Path, name: str | None) -> Run:
    """The run of that name, or the latest that was begun.

    Raises:
        RunError: there is none.
    """
    runs = [Run(path) for path in root.iterdir() if Run(path).recipe.is_file()] if root.is_dir() else []
    if name is None:
        if not runs:
            raise RunError(f"there is no run to resume in {printable(root)}", "begin one with `bnlab train DATA`")
        return max(runs, key=lambda run: run.recipe.stat().st_mtime_ns)
    run = Run(_named(root, name))
    if not run.recipe.is_file():
        known = sorted(run.name for run in runs)
        remedy = did_you_mean(name, known) if known else "begin one with `bnlab train DATA`"
        raise RunError(f"there is no run {printable(run.folder)}", remedy)
    return run


def _named(root: Path, name: str) -> Path:
    if not name or name in (".", "..") or Path(name).name != name or printable(name) != name:
        raise UsageError(
            f"a run cannot be named '{printable(name)}'",
            "a name has no slashes and no control characters; runs lie in the folder runs",
        )
    return root / name
