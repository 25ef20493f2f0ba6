"""The learning-rate range test (Smith, arXiv 1506.01186, 3.3): a short training whose rate rises at every step.

`find_lr` makes the sweep and `suggest` reads a rate off it. Neither knows what is trained: a step is a function from
rate to loss.

Smoothing. fastai reads the curve through an exponential average with weight 0.98. That lags 0.98 / 0.02 = 49 steps,
which of a sweep of 100 is half, here three powers of ten: the minimum is seen far right of where it is. We average over
the steps around, with weights that fall to nothing half a power of ten away on either side: there is no lag, and what
explodes at the end does not reach far back. Where the sweep shall stop is asked of the past alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bnlab.progress import Progress

STEPS = 200  # 33 to a power of ten; with 17 the fall on 2922 flowers was 2 to 4 standard errors, with 33 it was 5 to 6
_REACH = 0.5  # powers of ten to either side that are averaged; a minimum as near to an end may go on outside
_KEPT = 0.8  # of what the running average holds, at each step; it lags 4 steps and only stops the sweep
_TOO_HIGH = 4.0  # times the lowest average: it has diverged (Gugger's and fastai's number)
_SURE = 4.0  # standard errors by which the loss must fall; the lowest of many noisy means lies 2 or 3 low by chance
_LEAST = 8  # steps: fewer have no course to speak of


@dataclass(frozen=True)
class Curve:
    """Loss by learning rate, one entry a step; finite losses only."""

    rates: tuple[float, ...]
    """rising, in equal ratios"""
    losses: tuple[float, ...]
    """of each batch, before the step at that rate"""
    smoothed: tuple[float, ...]
    """averaged over the steps around; a loss of more than four times the lowest counts as four times"""
    diverged_at: float | None = None
    """the rate that ended the sweep: the loss became four times the lowest, or no number; None: it reached the end"""


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """What can be read off a curve; None is what cannot."""

    reason: str
    """why this rate is suggested, or why none"""
    diverged_at: float | None
    """as in the curve"""
    steepest: float | None = None
    """where the smoothed loss falls fastest, by the logarithm of the rate"""
    lowest: float | None = None
    """where it is lowest"""
    tenth_of_minimum: float | None = None
    """a tenth of that: Gugger's rule"""
    suggested: float | None = None
    """the rate to train with, to two digits; None where the curve has no clear answer"""


def find_lr(
    step: Callable[[float], float], *, low: float = 1e-5, high: float = 10.0, steps: int = STEPS, progress: Progress
) -> Curve:
    """Call `step` with rates that rise from `low` to `high` in equal ratios, until its loss diverges.

    `step` trains at the rate it is given, on the next batch, and gives that batch's loss, from before the update.
    """
    assert 0 < low < high
    assert steps > 1
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
            past = total / weights  # divided by the weights there are: without this bias correction it begins at 0
            lowest = min(lowest, past)
            task.advance(1, rate=rate, loss=past)
            if past > _TOO_HIGH * lowest:
                diverged_at = rate
                break
    limit = _TOO_HIGH * lowest  # else one loss of 1e6 would outweigh all that stands before it
    smoothed = _weights(rates) @ np.minimum(losses, limit) if losses else np.empty(0)
    return Curve(tuple(rates), tuple(losses), tuple(smoothed.tolist()), diverged_at)


def suggest(curve: Curve) -> Suggestion:
    """A rate that can stand as the peak of a schedule: that at which the loss was lowest.

    It is Smith's upper bound of a cycle (3.3), the rate at which the gain slows and turns. Gugger goes a power of ten
    below it, but reads a curve that lags, and means a rate to begin with; a peak is climbed to in hundreds of steps
    where the test spends 33 on a power of ten, and bears more. The measure: on 2922 flowers (bn_googlenet,
    64 px, batches of 32) the loss was lowest at 0.0045 and 0.0084, on two seeds; three epochs of one cycle with peaks
    of 0.0006, 0.004, 0.02 and 0.1 came to 37.0%, 56.6%, 62.0% and 39.2% on val (n = 332, one seed). So it errs low
    rather than high, and a peak of two or three times as much is worth a try.

    None is suggested where the loss never fell by more than its noise, diverged within a few steps, or was lowest at
    either end of the sweep.
    """
    end = curve.diverged_at
    if len(curve.rates) < _LEAST:
        return Suggestion(reason=f"the loss diverged within {_LEAST} steps, at a rate of {end:.2g}", diverged_at=end)
    rates, smoothed, weights = np.array(curve.rates), np.array(curve.smoothed), _weights(curve.rates)
    place = int(smoothed.argmin())
    fall = float(smoothed[0] - smoothed[place])
    noise = float(np.mean(np.diff(curve.losses[: place + 2]) ** 2)) / 2  # from step to step, so that no trend counts
    error = math.sqrt(noise * float((weights[0] ** 2).sum() + (weights[place] ** 2).sum()))
    if fall <= max(_SURE * error, 1e-6 * abs(float(smoothed[0]))):
        return Suggestion(
            reason=f"the loss never fell by more than its noise: by {fall:.3f}, standard error {error:.3f}",
            diverged_at=end,
        )
    lowest = float(rates[place])
    slopes = np.gradient(smoothed, np.log(rates))[: place + 1]
    edge = 10**_REACH
    if end is None and lowest * edge > rates[-1]:
        suggested, reason = None, f"the loss still fell near the highest rate tried, {rates[-1]:.2g}"
    elif lowest < rates[0] * edge:
        suggested, reason = None, f"the loss was lowest near the lowest rate tried, {rates[0]:.2g}"
    else:
        suggested, reason = float(f"{lowest:.2g}"), "the loss was lowest there"
    return Suggestion(
        reason=reason,
        diverged_at=end,
        steepest=float(rates[slopes.argmin()]),
        lowest=lowest,
        tenth_of_minimum=lowest / 10,
        suggested=suggested,
    )


def _weights(rates: Sequence[float]) -> NDArray[np.float64]:
    """How much each loss (column) counts for each smoothed one (row): a triangle in the logarithm of the rate."""
    places = np.log10(rates)
    weights = np.maximum(1 - np.abs(places[:, None] - places) / _REACH, 0)
    shares: NDArray[np.float64] = weights / weights.sum(1, keepdims=True)
    return shares
