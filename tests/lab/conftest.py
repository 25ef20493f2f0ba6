from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bnlab.lab.bench import Bench
from bnlab.lab.sides import open_sides
from bnlab.progress import Silent


def write_photos(folder: Path, number: int = 72, classes: int = 3) -> Path:
    """Noise of 8 x 8 pixels in which a bright band stands where the class says, so that it is quickly learnt."""
    random = np.random.default_rng(0)
    for i in range(number):
        pixels = random.integers(0, 120, (8, 8), dtype=np.uint8)
        label = i % classes
        pixels[:, 8 * label // classes : 8 * (label + 1) // classes] += 120
        place = folder / f"class{label}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of classes, of 72 tiny pictures."""
    return write_photos(tmp_path_factory.mktemp("photos"))


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
