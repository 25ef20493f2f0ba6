from pathlib import Path

import numpy as np
import pytest
import torch

from bnlab.data.source import open_training_data
from bnlab.nets import build
from bnlab.progress import Silent
from bnlab.recipe import Recipe
from bnlab.training import fitting
from bnlab.training.fitting import what_fits
from bnlab.training.loop import Trainee
from bnlab.training.trainee import make_trainee


@pytest.fixture
def trainee(data: Path) -> Trainee:
    recipe = Recipe(network="bn_small_inception", size=96, batch_size=24, precision="float32", ema=0.9)
    source = open_training_data(data, val=0.1, seed=0, progress=Silent())
    return make_trainee(recipe, build(recipe.network, classes=3), source, "cpu")


def limited(monkeypatch: pytest.MonkeyPatch, pixels: int) -> list[tuple[int, ...]]:
    """A device that holds so many pixels; what was tried on it."""
    tried: list[tuple[int, ...]] = []
    real = fitting.train_step

    def step(one: Trainee, batch: np.ndarray, labels: np.ndarray, number: int) -> object:
        tried.append(batch.shape[:2])
        if batch[..., 0].size > pixels:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(one, batch, labels, number)

    monkeypatch.setattr(fitting, "train_step", step)
    return tried


def test_what_fits_was_tried(trainee: Trainee, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: value.clone() for name, value in trainee.network.state_dict().items()}
    tried = limited(monkeypatch, 8 * 96 * 96)
    assert what_fits(trainee) == "--batch-size 6 or --size 48 fits"
    assert tried == [(12, 96), (6, 96), (24, 64), (24, 48)]
    assert all(torch.equal(before[name], value) for name, value in trainee.network.state_dict().items())


def test_sometimes_nothing_does(trainee: Trainee, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 0)
    assert what_fits(trainee) == "close what else takes memory, or take a network of a smaller width"


def test_other_errors_are_not_hidden(trainee: Trainee, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(fitting, "train_step", broken)
    with pytest.raises(RuntimeError, match="something else"):
        what_fits(trainee)
