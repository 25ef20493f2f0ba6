"""Fixtures: photos of three classes that a small network learns, a trained run, and a command line to call."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

os.environ["OMP_NUM_THREADS"] = "1"  # sums depend on it; small networks in two processes are slower with more
# Threads that spin while they wait take a hundred times as long on a busy machine.
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["GOMP_SPINCOUNT"] = "0"

from bnlab.__main__ import main
from bnlab.progress import NullProgress
from bnlab.report import canvas

CLASSES = ("disc", "ring", "stripes")


def picture(label: str, number: int, size: int = 40) -> Image.Image:
    """A noisy shape of that class, another one for each number."""
    random = np.random.default_rng((CLASSES.index(label), number))
    y, x = np.mgrid[0:size, 0:size]
    centre = size / 2 + random.uniform(-4, 4, 2)
    distance = np.hypot(y - centre[0], x - centre[1])
    match label:
        case "disc":
            shape = distance < size * random.uniform(0.25, 0.35)
        case "ring":
            shape = np.abs(distance - size * random.uniform(0.28, 0.38)) < 3
        case _:
            shape = (x + y * random.uniform(-0.4, 0.4) + random.uniform(0, 8)) % 8 < 4
    ink, paper = random.integers(130, 255, 3), random.integers(0, 110, 3)
    pixels = np.where(shape[..., None], ink, paper) + random.normal(0, 12, (size, size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_photos(folder: Path, each: int = 12, classes: tuple[str, ...] = CLASSES, first: int = 0) -> Path:
    """A folder of classes."""
    for label in classes:
        (folder / label).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + each):
            picture(label, number).save(folder / label / f"{label}{number:03}.png")
    return folder


class Notes(NullProgress):
    """Keeps notes as well as warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws the figures of pages in tests/report and tests/lab alone: it takes half the time of a small training."""
    real = canvas._saved

    def saved(*arguments: Any, format: str, **options: Any) -> bytes:
        return b"<svg></svg>" if format == "svg" else real(*arguments, format=format, **options)

    if not {"report", "lab"} & {*request.path.parts}:
        monkeypatch.setattr(canvas, "_saved", saved)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """36 photos in three classes."""
    return write_photos(tmp_path / "photos")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A split folder: 24 photos to train on, 12 to validate."""
    write_photos(tmp_path / "data" / "train", each=8)
    write_photos(tmp_path / "data" / "val", each=4, first=100)
    return tmp_path / "data"


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of folders that cannot be read, not even by root, whom permissions do not stop."""
    scandir = os.scandir

    def without_locked(folder: str | Path) -> Any:
        if Path(folder).name == "locked":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", without_locked)
    return "locked"


@pytest.fixture
def bnlab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., "Outcome"]:
    """Run a command line in an empty folder; the outcome is its status and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        status = main([str(a) for a in arguments])
        printed = capsys.readouterr()
        return Outcome(status, printed.out, printed.err)

    return run


class Outcome:
    """The exit status of a command line, and what it printed."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def complaint(self) -> str:
        """The one line that a refusal prints to stderr, without its `bnlab: `."""
        lines = [line for line in self.err.splitlines() if line.startswith("bnlab: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0].removeprefix("bnlab: ")


# The same examples on every run, however slow the machine.
settings.register_profile("bnlab", derandomize=True, deadline=None)
settings.load_profile("bnlab")

# Options of a training that takes seconds: the small network at its smallest size.
QUICK = ("--network", "bn_small_inception", "--size", 32, "--batch-size", 8, "--learning-rate", 0.02, "--workers", 0)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two epochs, which tests must not change."""
    from bnlab import train

    home = tmp_path_factory.mktemp("trained")
    write_photos(home / "data" / "train", each=8)
    write_photos(home / "data" / "val", each=4, first=100)
    result = train(
        home / "data",
        runs=home / "runs",
        network="bn_small_inception",
        size=32,
        batch_size=8,
        epochs=2,
        learning_rate=0.02,
    )
    return result.run.folder


@pytest.fixture
def run_copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run as runs/train, which a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / "train"))
