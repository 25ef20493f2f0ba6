from collections.abc import Callable
from pathlib import Path

import pytest

from bnlab.lab.bench import Bench
from bnlab.lab.cells import Place
from bnlab.lab.sides import open_sides
from bnlab.progress import Silent
from tests.conftest import write_photos


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three classes, of 72 small pictures."""
    return write_photos(tmp_path_factory.mktemp("photos"), each=24)


@pytest.fixture
def make_bench(tmp_path: Path, photos: Path) -> Callable[..., Bench]:
    """A bench on the tiny pictures, in this process; options are recipe keys for all its trainings."""

    def make(*, seeds: int = 2, kind: str = "digits", **options: object) -> Bench:
        sides = open_sides(photos, quick=True, least=10, folder=tmp_path / "sides", progress=Silent())
        sides.kind = kind
        return Bench(
            name="test",
            sides=sides,
            budget="quick",
            seeds=tuple(range(seeds)),
            device="cpu",
            processes=0,
            folder=tmp_path / "cells",
            progress=Silent(),
            options={"batch_size": 12, "steps": 6, "width": 0.25, "recalibrate": 24} | options,
        )

    return make


@pytest.fixture
def place(make_bench: Callable[..., Bench], tmp_path: Path) -> Place:
    """Where a cell of seed 0 is measured."""
    return Place(split=make_bench().sides.of(0), folder=tmp_path / "cell", device="cpu", seed=0)
