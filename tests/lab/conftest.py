from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from bnlab.lab.experiment import Experiment
from bnlab.lab.measurements import JobContext
from bnlab.lab.splits import open_study_splits
from bnlab.progress import NullProgress
from tests.conftest import write_photos


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three classes, of 72 small pictures."""
    return write_photos(tmp_path_factory.mktemp("photos"), each=24)


def tiny_experiment(
    photos: Path, folder: Path, *, seeds: int = 2, kind: str = "digits", **options: object
) -> Experiment:
    """An experiment on the tiny pictures, in this process; options are recipe keys for all its trainings."""
    splits = open_study_splits(photos, quick=True, min_photos=10, folder=folder / "splits", progress=NullProgress())
    splits.kind = kind
    return Experiment(
        name="test",
        splits=splits,
        budget="quick",
        seeds=tuple(range(seeds)),
        device="cpu",
        processes=0,
        folder=folder / "measured",
        progress=NullProgress(),
        options={"batch_size": 12, "steps": 6, "width": 0.25, "recalibration_images": 24} | options,
    )


@pytest.fixture
def make_experiment(tmp_path: Path, photos: Path) -> Callable[..., Experiment]:
    return partial(tiny_experiment, photos, tmp_path)


@pytest.fixture
def job(make_experiment: Callable[..., Experiment], tmp_path: Path) -> JobContext:
    """The context of a measurement of seed 0."""
    return JobContext(split=make_experiment().splits.for_seed(0), folder=tmp_path / "job", device="cpu", seed=0)
