"""Measurements that are kept: each is made once for its settings, in a process of its own where there is a core for it.

A cell is a function and its settings. Its result is filed under a digest of both, of the photos and of bnlab's code, so
what was measured is not measured again, an interrupted study goes on where it stood, and studies share trainings.

On a CPU a cell computes with one thread, whatever the machine: the networks of the studies are too small for more, two
trainings side by side are faster than two in turn, and results do not depend on the number of cores.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bnlab.data.split_csv import read_split_csv
from bnlab.errors import Interrupted, RunError, StorageError, printable
from bnlab.files import read_json, storage_errors, write_json
from bnlab.lab.processes import Job, run_jobs
from bnlab.lab.records import Records, Results, Value
from bnlab.machine import versions
from bnlab.progress import Progress
from bnlab.recipe import Recipe

# The parts of bnlab that numbers follow from, and those of lab that only show them, or whose choices a key has in it.
_MEASURES = ("norm", "nets", "data", "classifier", "training", "lab", "recipe.py", "machine.py")
_SHOWS = (
    "bench",
    "catalogue",
    "plots",
    "processes",
    "race",
    "records",
    "report",
    "sides",
    "study",
    "tuning",
    "verdict",
)


@dataclass(frozen=True, kw_only=True)
class JobContext:
    """Where a cell is measured."""

    split: Path
    """the list of photos, with the sides that the seed gave them"""
    folder: Path
    """of its own, for what it needs to go on; gone when it is done"""
    device: str
    seed: int
    report_steps: Callable[[int], None] = lambda steps: None
    """that so many steps are done"""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measurement."""

    do: Callable[..., Results]
    """a function of a module, called with a Place and the settings"""
    split: Path
    seed: int
    settings: Mapping[str, Any]
    """keyword arguments: what JSON can hold, and recipes"""
    labels: Mapping[str, Value] = field(default_factory=dict)
    """columns that say whose rows these are"""
    steps: int = 1
    """how long it takes, in steps of training"""

    def key(self, device: str) -> str:
        """A digest of all that its result follows from."""
        what = {
            "do": f"{self.do.__module__}.{self.do.__qualname__}",
            "photos": _photos(self.split, self.split.stat().st_mtime_ns),
            "seed": self.seed,
            "settings": self.settings,
            "device": device,
            "versions": versions(),
            "code": _code(self.do.__module__),
        }
        text = json.dumps(what, sort_keys=True, default=_plain)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True, kw_only=True)
class MeasurementResult:
    """A cell's result."""

    results: Results
    seconds: float
    """that measuring it took, whenever that was"""


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep other studies out: two that measure the same would write over each other.

    Raises:
        RunError: another study is there.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(f"another study measures in {printable(folder)}", "wait for it") from None
    try:
        yield
    finally:
        lock.release()


def measure_all(
    measurements: Sequence[Measurement], *, folder: Path, device: str, processes: int, title: str, progress: Progress
) -> list[MeasurementResult]:
    """The results of all cells, in their order; those not in `folder` yet are measured and put there.

    `processes` is how many at a time; 0 is none but this one.

    Raises:
        BnlabError: what a cell raised.
        Interrupted: Ctrl-C; what is done is kept, and long trainings were saved.
    """
    keys = [cell.key(device) for cell in measurements]
    pending = {key: cell for key, cell in zip(keys, measurements, strict=True) if _kept(folder, key) is None}
    weights = {key: cell.steps for key, cell in zip(keys, measurements, strict=True)}
    total, left = sum(weights.values()), sum(cell.steps for cell in pending.values())
    if len(pending) < len(weights):
        progress.note(f"{title}: {len(weights) - len(pending)} of {len(weights)} measurements were made before")
    with progress.task(title, total, "steps", done=total - left) as task:
        work = [Job(_measure, (key, cell, folder, device), cell.steps) for key, cell in pending.items()]
        try:
            run_jobs(work, processes=processes if device == "cpu" else 0, task=task)
        except KeyboardInterrupt:
            raise Interrupted("the study was interrupted; the same command goes on where it stood") from None
    found = {key: _kept(folder, key) for key in keys}
    for key, done in found.items():
        if done is None:
            raise StorageError(f"{printable(folder / key)}.json, just written, cannot be read", "see to the disk")
    return [done for key in keys if (done := found[key])]


def _measure(key: str, cell: Measurement, folder: Path, device: str, tell: Callable[[int], None]) -> None:
    """Measure a cell and keep its result."""
    own = folder / key
    own.mkdir(parents=True, exist_ok=True)
    job = JobContext(split=cell.split, folder=own, device=device, seed=cell.seed, report_steps=tell)
    spent = own / "seconds.json"
    before = float(read_json(spent).get("seconds", 0.0))  # of sittings that were interrupted
    began = time.monotonic()
    try:
        with _one_thread(device):
            results = cell.do(job, **cell.settings)
    except KeyboardInterrupt:
        write_json(spent, {"seconds": before + time.monotonic() - began})
        raise
    write_json(folder / f"{key}.json", {"tables": results, "seconds": before + time.monotonic() - began})
    shutil.rmtree(own, ignore_errors=True)


def _kept(folder: Path, key: str) -> MeasurementResult | None:
    document = read_json(folder / f"{key}.json")
    results: dict[str, Records] | None = document.get("tables")
    return None if results is None else MeasurementResult(results=results, seconds=float(document["seconds"]))


@contextmanager
def _one_thread(device: str) -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    try:
        if device == "cpu":
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def _photos(split: Path, changed: int) -> str:
    """A digest of a list of photos: what is in them, on which side, in their order; not where they lie."""
    digest = hashlib.sha256()
    for photo in read_split_csv(split):
        digest.update(f"{photo.sha256} {photo.split} {photo.label}\n".encode())
    return digest.hexdigest()


@cache
def _code(module: str) -> str:
    """A digest of the code that a number can follow from: what was measured by other code is not what this would.

    Of the studies it is that of the file or folder of `module`, for no study takes anything from another.
    """
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    study = module.removeprefix("bnlab.lab.studies.").partition(".")[0]
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).parts
        if parts[0] not in _MEASURES:
            continue
        if parts[:2] == ("lab", "studies"):
            needed = parts[2].removesuffix(".py") == study
        else:
            needed = parts[0] != "lab" or path.stem not in _SHOWS
        if needed:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _plain(value: object) -> object:
    if isinstance(value, Recipe):
        return value.model_dump(mode="json")
    raise TypeError(f"a cell's settings hold a {type(value).__name__}, not what JSON can")
