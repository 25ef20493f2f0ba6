from pathlib import Path

import numpy as np
import pytest
import torch

from bnlab.data.dataset import open_training_data
from bnlab.nets import build
from bnlab.progress import NullProgress
from bnlab.recipe import Recipe
from bnlab.training import memory_advice
from bnlab.training.build import TrainingContext, build_context
from bnlab.training.memory_advice import suggest_batch_size


@pytest.fixture
def context(data: Path) -> TrainingContext:
    recipe = Recipe(network="bn_small_inception", size=96, batch_size=24, precision="float32", ema=0.9)
    dataset = open_training_data(data, val=0.1, seed=0, progress=NullProgress())
    return build_context(recipe, build(recipe.network, classes=3), dataset, "cpu")


def limited(monkeypatch: pytest.MonkeyPatch, pixels: int) -> list[tuple[int, ...]]:
    """A device that holds so many pixels; what was tried on it."""
    tried: list[tuple[int, ...]] = []
    real = memory_advice.train_step

    def step(one: TrainingContext, batch: np.ndarray, labels: np.ndarray, number: int) -> object:
        tried.append(batch.shape[:2])
        if batch[..., 0].size > pixels:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(one, batch, labels, number)

    monkeypatch.setattr(memory_advice, "train_step", step)
    return tried


def test_what_fits_was_tried(context: TrainingContext, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: value.clone() for name, value in context.network.state_dict().items()}
    tried = limited(monkeypatch, 8 * 96 * 96)
    assert suggest_batch_size(context) == "--batch-size 6 or --size 48 fits"
    assert tried == [(12, 96), (6, 96), (24, 64), (24, 48)]
    assert all(torch.equal(before[name], value) for name, value in context.network.state_dict().items())


def test_sometimes_nothing_does(context: TrainingContext, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 0)
    assert suggest_batch_size(context) == "close what else takes memory, or take a network of a smaller width"


def test_other_errors_are_not_hidden(context: TrainingContext, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(memory_advice, "train_step", broken)
    with pytest.raises(RuntimeError, match="something else"):
        suggest_batch_size(context)
