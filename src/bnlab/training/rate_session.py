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
from bnlab.data.pixels import Pixels
from bnlab.errors import DivergedError
from bnlab.nets.build import to_device
from bnlab.progress import Progress
from bnlab.recipe import Recipe
from bnlab.training.find_rate import STEPS, Curve, find_rate
from bnlab.training.loop import Trainee, train_step
from bnlab.training.optimizer import set_learning_rate
from bnlab.training.setup import batch_errors, exact, fit_first_batch, set_up
from bnlab.training.trainee import make_trainee


@dataclass(frozen=True, kw_only=True)
class RangeTest:
    """The curve, and what it was measured on."""

    curve: Curve
    recipe: Recipe
    device: str
    classes: int
    photos: int
    """of train"""


def range_test(data: Path, settings: Settings, *, strict: bool, progress: Progress) -> RangeTest:
    """Train for a few hundred steps at most, at rising rates, and throw the network away.

    Raises:
        BnlabError: DATA or the recipe cannot be used; the loss is no number before any step; memory is full.
        KeyboardInterrupt: Ctrl-C; nothing was written.
    """
    ready = set_up(data, settings, strict=strict, progress=progress)
    recipe, device = ready.settings.recipe, ready.device
    trainee = make_trainee(recipe, to_device(ready.network, device), ready.source, device)
    photos = len(trainee.loader.paths)
    progress.note(
        f"trying learning rates: {recipe.network}, {len(ready.source.classes)} classes, {photos} train, "
        f"{recipe.size} px, batches of {recipe.batch_size}, at most {STEPS} steps, on {device} in {recipe.precision}"
    )
    with exact(device), batch_errors(trainee), closing(_batches(trainee)) as batches:
        fit_first_batch(trainee)
        trainee.network.train()
        steps = count()

        def step(rate: float) -> float:
            set_learning_rate(trainee.optimizer, rate)
            try:
                loss, _ = train_step(trainee, *next(batches), next(steps))
            except FloatingPointError:
                return math.nan
            return loss.item()

        curve = find_rate(step, progress=progress)
    if not curve.rates:
        raise DivergedError(
            "the loss was no number before any step, so no learning rate is to blame",
            "check mean, std and the file of --init",
        )
    return RangeTest(curve=curve, recipe=recipe, device=device, classes=len(ready.source.classes), photos=photos)


def _batches(trainee: Trainee) -> Generator[tuple[Pixels, NDArray[np.int64]], None, None]:
    """Epoch after epoch, for a small DATA has fewer batches than the test has steps."""
    for epoch in count():
        yield from trainee.loader.epoch(epoch, trainee.recipe.size)
