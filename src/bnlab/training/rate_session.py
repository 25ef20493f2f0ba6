"""The learning-rate range test on DATA, with the network, batches, loss and optimiser that a training would have."""

import math
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bnlab.config import Settings
from bnlab.data.preprocess import Pixels
from bnlab.errors import DivergedError
from bnlab.nets.build import move_network
from bnlab.progress import Progress
from bnlab.recipe import Recipe
from bnlab.training.build import make_context
from bnlab.training.loop import TrainingContext, train_step
from bnlab.training.lr_finder import STEPS, Curve, find_lr
from bnlab.training.optimizer import set_learning_rate
from bnlab.training.setup import batch_errors, exact, init_on_first_batch, set_up


@dataclass(frozen=True, kw_only=True)
class LrRangeTest:
    """The curve, and what it was measured on."""

    curve: Curve
    recipe: Recipe
    device: str
    classes: int
    photos: int
    """of train"""


def lr_range_test(data: Path, settings: Settings, *, strict: bool, progress: Progress) -> LrRangeTest:
    """Train for a few hundred steps at most, at rising rates, and throw the network away.

    Raises:
        BnlabError: DATA or the recipe cannot be used; the loss is no number before any step; memory is full.
        KeyboardInterrupt: Ctrl-C; nothing was written.
    """
    ready = set_up(data, settings, strict=strict, progress=progress)
    recipe, device = ready.settings.recipe, ready.device
    context = make_context(recipe, move_network(ready.network, device), ready.dataset, device)
    photos = len(context.loader.paths)
    progress.note(
        f"trying learning rates: {recipe.network}, {len(ready.dataset.classes)} classes, {photos} train, "
        f"{recipe.size} px, batches of {recipe.batch_size}, at most {STEPS} steps, on {device} in {recipe.precision}"
    )
    with exact(device), batch_errors(context), closing(_batches(context)) as batches:
        init_on_first_batch(context)
        context.network.train()
        steps = count()

        def step(rate: float) -> float:
            set_learning_rate(context.optimizer, rate)
            try:
                loss, _ = train_step(context, *next(batches), next(steps))
            except FloatingPointError:
                return math.nan
            return loss.item()

        curve = find_lr(step, progress=progress)
    if not curve.rates:
        raise DivergedError(
            "the loss was no number before any step, so no learning rate is to blame",
            "check mean, std and the file of --init",
        )
    return LrRangeTest(curve=curve, recipe=recipe, device=device, classes=len(ready.dataset.classes), photos=photos)


def _batches(context: TrainingContext) -> Generator[tuple[Pixels, NDArray[np.int64]], None, None]:
    """Epoch after epoch, for a small DATA has fewer batches than the test has steps."""
    for epoch in count():
        yield from context.loader.epoch(epoch, context.recipe.size)
