"""Run folders: the files a training leaves, their names, and a lock so that only one training writes to each."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from bnlab.errors import RunError, UsageError, did_you_mean, printable, quoted
from bnlab.files import storage_errors

RUNS = Path("runs")
_WRITTEN_BEFORE_THE_RECIPE = {".lock", "split.csv", "data.json", "environment.json", "refused.csv", "ancestors.json"}


class Run:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        self.recipe = folder / "recipe.yaml"  # all settings, and where each came from
        self.split = folder / "split.csv"  # which photo is in train, val or test
        self.refused = folder / "refused.csv"  # photos that could not be used, if there are any
        self.ancestors = folder / "ancestors.json"  # the trainings before it and the photos they saw, with init
        self.metrics = folder / "metrics.csv"  # one row an epoch
        self.health = folder / "health.csv"  # one row a normalisation layer, of the last epoch
        self.best = folder / "best.safetensors"  # the classifier of the best epoch
        self.last = folder / "last.safetensors"  # the classifier of the last epoch
        self.state = folder / "state.pt"  # the checkpoint from which a training resumes
        self.environment = folder / "environment.json"  # the machine and the versions of libraries
        self.report = folder / "report.html"
        self.events = folder / "tensorboard"

    def resume_command(self, data: str = "") -> str:
        """What resumes the run, on photos at `data`: a command, or a call if the command line does not find the run."""
        if self.folder.parent == RUNS:
            return f"bnlab train {data}{' ' * bool(data)}--resume --name {quoted(self.name)}"
        return f"bnlab.resume({self.name!r}, {f'data={data}, ' * bool(data)}runs={str(self.folder.parent)!r})"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other trainings out while the block runs. The lock ends with the process, even if it is killed.

        Raises:
            RunError: another training has the lock.
        """
        lock = FileLock(self.folder / ".lock")
        problem = f"run {printable(self.folder)} is in use by another training"
        with storage_errors(self.folder):
            try:
                held = lock.acquire(timeout=0)
            except Timeout:
                raise RunError(problem, "wait for it, or pass another name") from None
        with held:
            yield


def check_free(root: Path, name: str | None) -> None:
    """Refuse a name that `new_run` would refuse, before any work is done.

    Raises:
        RunError: the name is taken.
        UsageError: the name is not valid.
    """
    if name is None:
        return
    run = Run(_named(root, name))
    with storage_errors(run.folder):
        left = {path.name for path in run.folder.iterdir()} if run.folder.exists() else set()
    # A training that was killed before it wrote its recipe leaves a lock and nothing that anyone would miss.
    never_began = ".lock" in left and all(n in _WRITTEN_BEFORE_THE_RECIPE or n.endswith(".part") for n in left)
    if left and not never_began:
        resume = f", or continue it: {run.resume_command()}" if run.recipe.is_file() else ""
        raise RunError(f"run {printable(run.folder)} exists already", f"pass another name{resume}")


def new_run(root: Path, name: str | None, stem: str = "train") -> Run:
    """Make the folder of a new run: `root/name`, or without a name the first free of `stem`, `stem2`, ...

    Raises:
        RunError: the name is taken.
        UsageError: the name is not valid.
        StorageError: the folder cannot be made.
    """
    check_free(root, name)
    with storage_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        if name is not None:
            run = Run(_named(root, name))
            run.folder.mkdir(exist_ok=True)
            return run
        numbers = itertools.count(2)
        folder = root / stem
        while True:
            try:
                folder.mkdir()
                return Run(folder)
            except FileExistsError:
                folder = root / f"{stem}{next(numbers)}"


def find_run(root: Path, name: str | None) -> Run:
    """The run of that name, or without a name the latest.

    Raises:
        RunError: there is no such run.
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
            f"'{printable(name)}' is not valid as the name of a run",
            "use a name without slashes and control characters; runs lie in the folder runs",
        )
    return root / name
