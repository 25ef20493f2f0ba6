"""The highest learning rate that a network bears, by bisection."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from bnlab.errors import DivergedError
from bnlab.lab.measurements import JobContext
from bnlab.lab.records import Records, Results
from bnlab.lab.trained_network import train
from bnlab.recipe import Recipe

PROBES = 6  # trainings that a search is likely to take; four to as high a power is as far as it goes
BLOWN_UP = 1.1  # times the loss of guessing
_FACTOR = 4.0
_ALIKE = 1e-6  # of probabilities


def max_stable_lr(job: JobContext, recipe: Recipe) -> Results:
    """The highest constant rate at which a training is stable: by bisection, from the recipe's own.

    Stable: no step's loss was without a number, the loss on val at the end (statistics measured anew) is at most 1.1
    times that of guessing, log(classes), and the outputs follow from the photo (where all units of a layer are dead,
    they are the same for all). `rate` is None where no rate was; `at_least` is 1 where the highest tried was stable.
    """
    tried: Records = []

    def stable(rate: float) -> bool:
        here = replace(job, folder=job.folder / f"{rate:g}")
        trained = train(here, recipe.model_copy(update={"learning_rate": rate}))
        loss, spread = math.inf, 0.0
        with suppress(DivergedError):  # what the last step left may give no number on val
            if not trained.diverged:
                found = trained.evaluation("val", "recalibrated")
                loss, spread = found.loss, float(found.probabilities.std(0).max())
        good = loss <= BLOWN_UP * math.log(len(trained.dataset.classes)) and spread > _ALIKE
        tried.append({"rate": rate, "stable": int(good), "loss": loss if math.isfinite(loss) else None})
        return good

    rate, ended = bisected(stable, recipe.learning_rate)
    return {"tried": tried, "highest": [{"rate": rate, "at_least": int(not ended)}]}


def bisected(stable: Callable[[float], bool], start: float) -> tuple[float | None, bool]:
    """The highest stable rate, to a factor of 2: in steps of 4 from `start` up or down, then once between.

    With it whether a higher one was not stable: far above `start` the search gives up; None where it does far below.
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
