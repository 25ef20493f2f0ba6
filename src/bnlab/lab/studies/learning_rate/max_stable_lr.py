"""The highest learning rate at which a training is stable, by bisection."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from bnlab.errors import DivergedError
from bnlab.lab.measurements import JobContext
from bnlab.lab.records import Records, Results
from bnlab.lab.trained_network import train
from bnlab.recipe import Recipe

PROBES = 6  # trainings that a search is likely to take; it goes at most this many factors up or down
BLOWN_UP = 1.1  # times the loss of guessing, from which on a training counts as unstable
_FACTOR = 4.0
_ALIKE = 1e-6  # probabilities that differ less between photos are the same


def max_stable_lr(job: JobContext, recipe: Recipe) -> Results:
    """The highest constant rate at which a training is stable, by bisection from the recipe's rate.

    A training is stable if every step's loss was finite, the final loss on val by recalibrated statistics is at most
    1.1 times that of guessing, log(classes), and the outputs depend on the photo; if all units of a layer are dead,
    they do not. `rate` is None if no rate was stable; `at_least` is 1 if the highest tried was.
    """
    tried: Records = []

    def stable(rate: float) -> bool:
        here = replace(job, folder=job.folder / f"{rate:g}")
        trained = train(here, recipe.model_copy(update={"learning_rate": rate}))
        loss, spread = math.inf, 0.0
        with suppress(DivergedError):  # the last step may have left weights that give no finite loss
            if not trained.diverged:
                found = trained.evaluation("val", "recalibrated")
                loss, spread = found.loss, float(found.probabilities.std(0).max())
        good = loss <= BLOWN_UP * math.log(len(trained.context.dataset.classes)) and spread > _ALIKE
        tried.append({"rate": rate, "stable": int(good), "loss": loss if math.isfinite(loss) else None})
        return good

    rate, ended = bisected(stable, recipe.learning_rate)
    return {"tried": tried, "highest": [{"rate": rate, "at_least": int(not ended)}]}


def bisected(stable: Callable[[float], bool], start: float) -> tuple[float | None, bool]:
    """The highest stable rate to a factor of 2, and whether a higher one was tried and not stable.

    The search goes up or down from `start` in factors of 4, then tries once between the last two. Far above `start` it
    stops with the highest rate tried, far below with None.
    """
    rate = start
    if stable(rate):
        while stable(rate * _FACTOR):
            rate *= _FACTOR
            if rate >= start * _FACTOR**PROBES:
                return rate, False
    else:
        rate /= _FACTOR
        while not stable(rate):
            rate /= _FACTOR
            if rate < start / _FACTOR**PROBES:
                return None, True
    middle = rate * math.sqrt(_FACTOR)
    return (middle if stable(middle) else rate), True
