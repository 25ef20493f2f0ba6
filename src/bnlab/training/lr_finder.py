"""The learning-rate range test (Smith, arXiv 1506.01186, 3.3): a short training whose rate rises at every step.

`lr_range_test` builds the training, `find_lr` makes the sweep and `suggest` reads a rate off the curve. The last two
do not depend on what is trained: a step is a function from rate to loss.

Smoothing. fastai smooths the curve with an exponential average of weight 0.98, which lags 0.98 / 0.02 = 49 steps. That
is half of a sweep of 100 steps, here three powers of ten, so that the minimum appears at far too high a rate. We take
the mean over the neighbouring steps, with weights that fall linearly to 0 half a power of ten away on either side:
there is no lag, and an explosion at the end does not reach far back. Past steps alone decide when the sweep stops.
"""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bnlab.config import Settings
from bnlab.data.preprocess import Pixels
from bnlab.data.scan import Refusal
from bnlab.errors import DivergedError
from bnlab.progress import Progress
from bnlab.recipe import Recipe
from bnlab.training.build import TrainingContext, build_context, init_on_first_batch, prepare
from bnlab.training.loop import deterministic, train_step
from bnlab.training.memory_advice import batch_errors
from bnlab.training.optimizer import set_learning_rate
from bnlab.training.state import LossNotFiniteError

STEPS = 200  # 33 per power of ten; with 17 the fall on 2922 flowers was 2 to 4 standard errors, with 33 it was 5 to 6
_REACH = 0.5  # powers of ten averaged on either side; a minimum as near to an end may lie outside the sweep
_KEPT = 0.8  # weight of the past in the running average that decides when to stop; it lags 4 steps
_TOO_HIGH = 4.0  # times the lowest average: the loss has diverged (Gugger's and fastai's number)
_SURE = 4.0  # standard errors by which the loss must fall; the lowest of many noisy means is 2 or 3 too low by chance
_LEAST = 8  # steps: fewer show no trend


@dataclass(frozen=True)
class Curve:
    """Loss by learning rate, one entry a step; finite losses only."""

    rates: tuple[float, ...] = field(repr=False)  # rising, in equal ratios
    losses: tuple[float, ...] = field(repr=False)  # of each batch, before the step at that rate
    smoothed: tuple[float, ...] = field(repr=False)
    """averaged over the neighbouring steps; a loss of more than four times the lowest counts as four times"""
    diverged_at: float | None = None
    """the rate that ended the sweep: the loss became four times the lowest, or not finite; None: it reached the end"""


@dataclass(frozen=True, kw_only=True)
class LrRangeTest:
    """The curve, and what it was measured on."""

    curve: Curve
    recipe: Recipe
    device: str
    classes: int
    photos: int  # number of training photos
    refused: tuple[Refusal, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """What can be read off a curve; None where it has no clear answer."""

    suggested: float | None = None  # the rate to train with, to two digits
    reason: str  # why this rate is suggested, or why none is
    steepest: float | None = None  # rate at which the smoothed loss falls fastest, by the logarithm of the rate
    lowest: float | None = None  # rate at which the smoothed loss is lowest
    tenth_of_minimum: float | None = None  # a tenth of `lowest`: Gugger's rule


def lr_range_test(data: Path, settings: Settings, *, strict: bool, progress: Progress) -> LrRangeTest:
    """Train for at most `STEPS` steps at rising rates, with the network, batches, loss and optimiser of the recipe.

    Raises:
        BnlabError: DATA or the recipe cannot be used; the loss is not finite before any step; the memory is full.
        KeyboardInterrupt: Ctrl-C; nothing was written.
    """
    prepared = prepare(data, settings, strict=strict, progress=progress)
    recipe, device, classes = prepared.settings.recipe, prepared.device, len(prepared.dataset.classes)
    context = build_context(recipe, prepared.network, prepared.dataset, device)
    photos = len(context.loader.paths)
    progress.note(
        f"trying learning rates: {recipe.network}, {classes} classes, {photos} train, "
        f"{recipe.size} px, batches of {recipe.batch_size}, at most {STEPS} steps, on {device} in {recipe.precision}"
    )
    with deterministic(device), batch_errors(context), closing(_batches(context)) as batches:
        init_on_first_batch(context)
        context.network.train()
        steps = count()

        def step(rate: float) -> float:
            set_learning_rate(context.optimizer, rate)
            try:
                loss, _ = train_step(context, *next(batches), next(steps))
            except LossNotFiniteError:
                return math.nan
            return loss.item()

        curve = find_lr(step, progress=progress)
    context.loader.reader.report(progress)
    if not curve.rates:
        raise DivergedError(
            "the loss was not finite before any step, so no learning rate is to blame",
            "check mean, std and the file in init",
        )
    refused = prepared.dataset.refused
    return LrRangeTest(curve=curve, recipe=recipe, device=device, classes=classes, photos=photos, refused=refused)


def _batches(context: TrainingContext) -> Generator[tuple[Pixels, NDArray[np.int64]], None, None]:
    """Epoch after epoch, since a small DATA has fewer batches than the test has steps."""
    for epoch in count():
        yield from context.loader.epoch(epoch, context.recipe.size)


def find_lr(
    step: Callable[[float], float], *, low: float = 1e-5, high: float = 10.0, steps: int = STEPS, progress: Progress
) -> Curve:
    """Call `step` with rates that rise from `low` to `high` in equal ratios, until its loss diverges.

    `step` trains on the next batch at the rate it is given, and returns the loss of that batch before the update.
    """
    rates: list[float] = []
    losses: list[float] = []
    total = weights = 0.0
    lowest, diverged_at = math.inf, None
    with progress.task("finding a learning rate", steps, "steps") as task:
        for rate in np.geomspace(low, high, steps).tolist():
            loss = step(rate)
            if not math.isfinite(loss):
                diverged_at = rate
                break
            rates.append(rate)
            losses.append(loss)
            total, weights = _KEPT * total + loss, _KEPT * weights + 1
            past = total / weights  # with bias correction: the average would begin at 0 otherwise
            lowest = min(lowest, past)
            task.advance(1, rate=rate, loss=past)
            if past > _TOO_HIGH * lowest:
                diverged_at = rate
                break
    limit = _TOO_HIGH * lowest  # otherwise one loss of 1e6 would outweigh all the others
    smoothed = _weights(rates) @ np.minimum(losses, limit) if losses else np.empty(0)
    return Curve(tuple(rates), tuple(losses), tuple(smoothed.tolist()), diverged_at)


def suggest(curve: Curve) -> Suggestion:
    """Suggest the peak rate of a schedule: the rate at which the loss was lowest.

    This is Smith's upper bound of a cycle (3.3), where the gain slows and turns. Gugger takes a tenth of it, but reads
    a curve that lags, and looks for a rate to begin with. A schedule climbs to its peak in hundreds of steps where the
    test spends 33 on a power of ten, so the peak may be higher. Measured on 2922 flowers (bn_googlenet, 64 px, batches
    of 32), the loss was lowest at 0.0045 and 0.0084 with two seeds. Three epochs of one cycle with peaks of 0.0006,
    0.004, 0.02 and 0.1 reached 37.0%, 56.6%, 62.0% and 39.2% on val (n = 332, one seed). So the suggestion is rather
    low, and a peak of two or three times as much is worth trying.

    No rate is suggested if the loss never fell by more than its noise, diverged within a few steps, or was lowest at
    either end of the sweep.
    """
    end = curve.diverged_at
    if len(curve.rates) < _LEAST:
        return Suggestion(reason=f"the loss diverged within {_LEAST} steps, at a rate of {end:.2g}")
    rates, smoothed, weights = np.array(curve.rates), np.array(curve.smoothed), _weights(curve.rates)
    index = int(smoothed.argmin())
    fall = float(smoothed[0] - smoothed[index])
    differences = np.diff(curve.losses[: index + 2])  # of steps, so that a trend does not count as noise
    noise = float(np.mean(differences**2)) / 2
    error = math.sqrt(noise * float((weights[0] ** 2).sum() + (weights[index] ** 2).sum()))
    if fall <= max(_SURE * error, 1e-6 * abs(float(smoothed[0]))):
        reason = f"the loss never fell by more than its noise: by {fall:.3f}, standard error {error:.3f}"
        return Suggestion(reason=reason)
    lowest = float(rates[index])
    slopes = np.gradient(smoothed, np.log(rates))[: index + 1]
    edge, suggested = 10**_REACH, None
    if end is None and lowest * edge > rates[-1]:
        reason = f"the loss still fell near the highest rate tried, {rates[-1]:.2g}"
    elif lowest < rates[0] * edge:
        reason = f"the loss was lowest near the lowest rate tried, {rates[0]:.2g}"
    else:
        suggested, reason = float(f"{lowest:.2g}"), "the loss was lowest there"
    return Suggestion(
        reason=reason,
        steepest=float(rates[slopes.argmin()]),
        lowest=lowest,
        tenth_of_minimum=lowest / 10,
        suggested=suggested,
    )


def _weights(rates: Sequence[float]) -> NDArray[np.float64]:
    """The weight of each loss (column) in each smoothed loss (row): a triangle in the logarithm of the rate."""
    exponents = np.log10(rates)
    weights = np.maximum(1 - np.abs(exponents[:, None] - exponents) / _REACH, 0)
    normalised: NDArray[np.float64] = weights / weights.sum(1, keepdims=True)
    return normalised
