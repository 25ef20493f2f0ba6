from pathlib import Path

import numpy as np
import pytest
import torch

from bnlab.data.dataset import open_training_data
from bnlab.errors import OutOfMemoryError, UsageError
from bnlab.nets import build
from bnlab.progress import NullProgress
from bnlab.recipe import Recipe
from bnlab.training import memory_advice
from bnlab.training.build import TrainingContext, build_context
from bnlab.training.loop import train_step
from bnlab.training.memory_advice import batch_errors, suggest_batch_size


def context_of(data: Path, **changes: object) -> TrainingContext:
    options = {"network": "bn_small_inception", "size": 96, "batch_size": 24, "precision": "float32", "ema": 0.9}
    recipe = Recipe.model_validate(options | changes)
    dataset = open_training_data(data, val=0.1, seed=0, progress=NullProgress())
    network = build(recipe.network, classes=3, width=0.25, norm=recipe.norm)
    return build_context(recipe, network, dataset, "cpu")


@pytest.fixture
def context(data: Path) -> TrainingContext:
    return context_of(data)


def limited(monkeypatch: pytest.MonkeyPatch, pixels: int) -> list[tuple[int, ...]]:
    """Make a device that holds so many pixels; gives what is tried on it."""
    tried: list[tuple[int, ...]] = []
    real = memory_advice.train_step

    def step(one: TrainingContext, batch: np.ndarray, labels: np.ndarray, number: int) -> object:
        tried.append(batch.shape[:2])
        if batch[..., 0].size > pixels:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(one, batch, labels, number)

    monkeypatch.setattr(memory_advice, "train_step", step)
    return tried


def test_what_is_suggested_was_tried(context: TrainingContext, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: value.clone() for name, value in context.network.state_dict().items()}
    tried = limited(monkeypatch, 8 * 96 * 96)
    with pytest.raises(OutOfMemoryError) as error, batch_errors(context):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
    assert "batch size of 24 and a size of 96 px" in error.value.problem
    assert error.value.remedy == "batch_size=6 or size=48 fits; accumulate=4 keeps the photos of a step"
    assert tried == [(12, 96), (6, 96), (24, 64), (24, 48)]
    assert all(torch.equal(before[name], value) for name, value in context.network.state_dict().items())


@pytest.mark.slow
def test_a_batch_of_accumulated_steps_is_tried_with_as_many_batches(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(data, accumulate=2)
    tried = limited(monkeypatch, 2 * 8 * 96 * 96)
    assert suggest_batch_size(context) == "batch_size=6 or size=48 fits; accumulate=8 keeps the photos of a step"
    assert tried == [(24, 96), (12, 96), (48, 64), (48, 48)]


@pytest.mark.slow
def test_where_nothing_fits_other_remedies_are_named(context: TrainingContext, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = limited(monkeypatch, 0)
    assert "smaller width" in suggest_batch_size(context)
    assert len(tried) > 4


def test_other_errors_are_not_hidden(context: TrainingContext, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(memory_advice, "train_step", broken)
    with pytest.raises(RuntimeError, match="something else"):
        suggest_batch_size(context)
    for error in (ValueError("something else"), RuntimeError("something else")):
        with pytest.raises(type(error), match="something else"), batch_errors(context):
            raise error


def test_a_part_of_a_batch_with_one_value_per_channel_has_a_remedy(data: Path) -> None:
    context = context_of(data, network="bn_mlp", norm="ghost:1", size=32)
    context.network.train()
    with pytest.raises(UsageError) as error, batch_errors(context):
        train_step(context, *next(context.loader.epoch(0, 32)), 0)
    assert "nothing to normalise by" in error.value.problem
    assert "batch_size" in error.value.remedy
