"""Run folders: what a training leaves, under which names, and that only one training writes to each."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from bnlab.errors import RunError, UsageError, did_you_mean, printable, quoted
from bnlab.files import storage_errors

RUNS = Path("runs")
_BEFORE_IT_BEGINS = {".lock", "split.csv", "environment.json", "refused.csv"}


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
    def refused(self) -> Path:
        """Photos that could not be used, where there are any."""
        return self.folder / "refused.csv"

    @property
    def metrics(self) -> Path:
        """One row an epoch."""
        return self.folder / "metrics.csv"

    @property
    def health(self) -> Path:
        """One row a normalisation layer, of the last epoch."""
        return self.folder / "health.csv"

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


def check_free(root: Path, name: str | None) -> None:
    """Refuse early a name that `new_run` would refuse.

    Raises:
        RunError: the name is taken.
        UsageError: the name cannot be one.
    """
    if name is None:
        return
    run = Run(_named(root, name))
    with storage_errors(run.folder):
        left = {path.name for path in run.folder.iterdir()} if run.folder.exists() else set()
    # What a training leaves that was killed before its recipe stood: its own lock, and nothing anyone would miss.
    never_began = ".lock" in left and all(n in _BEFORE_IT_BEGINS or n.endswith(".part") for n in left)
    if left and not never_began:
        goes_on = f", or go on with it: --resume --name {quoted(name)}" if run.recipe.is_file() else ""
        raise RunError(f"run {printable(run.folder)} exists already", f"take another --name{goes_on}")


def new_run(root: Path, name: str | None, stem: str = "train") -> Run:
    """Make the folder of a new run: `root/name`, or the first free of `stem`, `stem2`, ... where no name is given.

    Raises:
        RunError: the name is taken.
        UsageError: the name cannot be one.
        StorageError: the folder cannot be made.
    """
    check_free(root, name)
    with storage_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    if name is not None:
        run = Run(_named(root, name))
        with storage_errors(run.folder):
            run.folder.mkdir(exist_ok=True)
        return run
    number = 1
    while True:
        folder = root / (stem if number == 1 else f"{stem}{number}")
        with storage_errors(folder):
            try:
                folder.mkdir()
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
