"""Measurements, and the folder that keeps their results.

A measurement is a function and its settings. Its result is filed under a digest of both, of the photos and of the code
that it follows from. So nothing is measured twice, an interrupted study continues, and studies share trainings.

On a CPU a measurement computes with one thread. The networks of the studies are too small for more, two trainings at a
time are faster than two in turn, and results do not depend on the number of cores.
"""

import ast
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

from bnlab.data.photos import ERRORS
from bnlab.data.split_csv import read_split_csv
from bnlab.errors import Interrupted, RunError, StorageError, printable
from bnlab.files import read_json, storage_errors, write_json
from bnlab.lab.processes import Job, run_jobs
from bnlab.lab.records import Results, Value
from bnlab.machine import versions
from bnlab.progress import Progress
from bnlab.recipe import Recipe

_SOURCE = Path(__file__).parents[1]
# What studies import to plan their measurements, and to compare and show the results. The code of a measurement ends
# here. A module that is missing from this list only leads to measurements that are repeated without need.
_NOT_MEASURING = (
    *("errors", "progress", "report", "lab.clauses", "lab.experiment", "lab.lr_selection"),
    *("lab.plots", "lab.study", "lab.verdict"),
)


@dataclass(frozen=True, kw_only=True)
class JobContext:
    """What a measurement is made with, apart from its settings."""

    split: Path  # The split.csv of the seed.
    folder: Path  # A folder for checkpoints, which is removed when the measurement is done.
    device: str
    seed: int
    report_steps: Callable[[int], None] = lambda steps: None  # Reports that so many more steps are done.


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measurement: `do(job, **settings)`."""

    do: Callable[..., Results]  # A function of a module. Its first argument is a JobContext.
    split: Path
    seed: int
    settings: Mapping[str, Any]  # Keyword arguments: recipes, and values that JSON can hold.
    labels: Mapping[str, Value] = field(default_factory=dict)  # Columns that are added to each row of the result.
    steps: int = 1  # How long it takes, in steps of training.

    def key(self, device: str) -> str:
        """A digest of everything that the result follows from."""
        dumped = {k: v.model_dump(mode="json") if isinstance(v, Recipe) else v for k, v in self.settings.items()}
        what = {
            "do": f"{self.do.__module__}.{self.do.__qualname__}",
            "photos": _photos_digest(self.split, self.split.stat().st_mtime_ns),
            "seed": self.seed,
            "settings": dumped,
            "device": device,
            "versions": versions(),
            "code": code_digest(self.do.__module__),
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True, kw_only=True)
class MeasurementResult:
    results: Results
    seconds: float  # The time that the measurement took, interrupted attempts included.


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock the folder of measurements: two studies that make the same measurement would overwrite each other's files.

    Raises:
        RunError: another study has locked it.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(folder / ".lock").acquire(timeout=0)
        except Timeout:
            raise RunError(f"another study measures in {printable(folder)}", "wait for it") from None
    with lock:
        yield


def measure_all(
    measurements: Sequence[Measurement], *, folder: Path, device: str, processes: int, title: str, progress: Progress
) -> list[MeasurementResult]:
    """The results of all measurements, in their order. Those that `folder` does not keep yet are made.

    `processes` is how many are made at a time, on a CPU; with 0 they are made in this process.

    Raises:
        BnlabError: what a measurement raised.
        Interrupted: Ctrl-C. Finished measurements are kept, and long trainings have saved a checkpoint.
    """
    keys = [measurement.key(device) for measurement in measurements]
    by_key = dict(zip(keys, measurements, strict=True))
    pending = {key: each for key, each in by_key.items() if _kept(folder, key) is None}
    total, left = (sum(each.steps for each in some.values()) for some in (by_key, pending))
    if len(pending) < len(by_key):
        progress.note(f"{title}: {len(by_key) - len(pending)} of {len(by_key)} measurements were made before")
    with progress.task(title, total, "steps", done=total - left) as task:
        jobs = [Job(_measure, (key, each, folder, device), each.steps) for key, each in pending.items()]
        try:
            run_jobs(jobs, processes=processes if device == "cpu" else 0, task=task)
        except KeyboardInterrupt:
            raise Interrupted("the study was interrupted; the same command continues it") from None
    return [_read_back(folder, key) for key in keys]


def _measure(
    key: str, measurement: Measurement, folder: Path, device: str, report_steps: Callable[[int], None]
) -> None:
    import torch

    own = folder / key
    own.mkdir(parents=True, exist_ok=True)
    job = JobContext(
        split=measurement.split, folder=own, device=device, seed=measurement.seed, report_steps=report_steps
    )
    interrupted = own / "seconds.json"
    began = time.monotonic() - float(read_json(interrupted).get("seconds", 0.0))
    threads = torch.get_num_threads()
    try:
        if device == "cpu":
            torch.set_num_threads(1)
        results = measurement.do(job, **measurement.settings)
    except KeyboardInterrupt:
        write_json(interrupted, {"seconds": time.monotonic() - began})
        raise
    finally:
        torch.set_num_threads(threads)
    write_json(folder / f"{key}.json", {"tables": results, "seconds": time.monotonic() - began})
    shutil.rmtree(own, ignore_errors=True)


def _kept(folder: Path, key: str) -> MeasurementResult | None:
    document = read_json(folder / f"{key}.json")
    if "tables" not in document:
        return None
    return MeasurementResult(results=document["tables"], seconds=float(document["seconds"]))


def _read_back(folder: Path, key: str) -> MeasurementResult:
    result = _kept(folder, key)
    if result is None:
        raise StorageError(f"{printable(folder / key)}.json was just written and cannot be read", "check the disk")
    return result


@cache
def _photos_digest(split: Path, changed: int) -> str:
    """A digest of a split.csv: the content, split and class of its photos, in their order, but not their paths."""
    digest = hashlib.sha256()
    for photo in read_split_csv(split):
        digest.update(f"{photo.sha256} {photo.split} {photo.label}\n".encode("utf-8", ERRORS))
    return digest.hexdigest()


@cache
def code_digest(module: str, source: Path = _SOURCE) -> str:
    """A digest of the code of a module and of the modules of bnlab that it imports, directly or in turn.

    Comments, docstrings and the modules in _NOT_MEASURING do not count. Other packages do by their versions, see `key`.
    """
    code: dict[str, str] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        inner = name.removeprefix("bnlab.")
        path = source.joinpath(*inner.split("."))
        file = next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
        shows = any(f"{inner}.".startswith(f"{other}.") for other in _NOT_MEASURING)
        if name in code or inner == name or file is None or shows:  # inner is name in other packages
            continue
        code[name], imported = _read(file.read_bytes())
        pending += imported
    return hashlib.sha256(repr(sorted(code.items())).encode()).hexdigest()


@cache
def _read(text: bytes) -> tuple[str, tuple[str, ...]]:
    """The code of a module without comments and docstrings, and what it imports."""
    tree = _WithoutDocstrings().visit(ast.parse(text))
    imported: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:  # what is imported may be a module
            imported += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return ast.dump(tree), tuple(imported)


class _WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node
