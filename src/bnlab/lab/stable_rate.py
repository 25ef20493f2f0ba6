"""The highest learning rate that a network bears, by bisection."""

import math
from collections.abc import Callable
from dataclasses import replace

from bnlab.lab.cells import Place
from bnlab.lab.course import train
from bnlab.lab.records import Records, Tables
from bnlab.recipe import Recipe

PROBES = 6  # trainings that a search is likely to take; ten times as many powers are the most
_FACTOR = 4.0
_BLOWN_UP = 1.1  # times the loss of guessing


def highest_rate(place: Place, recipe: Recipe) -> Tables:
    """The highest constant rate at which a training is stable: by bisection, from the recipe's own.

    Stable: the loss is finite and its mean over the last epoch at most 1.1 times that of guessing, log(classes); and
    the outputs still follow from the photo (where all units of a layer are dead, they are the same for all).
    """
    tried: Records = []

    def stable(rate: float) -> bool:
        here = replace(place, folder=place.folder / f"{rate:g}")
        course = train(here, recipe.model_copy(update={"learning_rate": rate}))
        loss = course.tables["accuracy"][-1]["train_loss"]
        good = not course.diverged and loss is not None
        if good:
            good = float(loss or 0) <= _BLOWN_UP * math.log(len(course.source.classes))
            good = good and float(course.evaluation("val").probabilities.std(0).max()) > 1e-6
        tried.append({"rate": rate, "stable": int(good), "loss": loss})
        return good

    return {"tried": tried, "highest": [{"rate": bisected(stable, recipe.learning_rate)}]}


def bisected(stable: Callable[[float], bool], start: float) -> float:
    """The highest stable rate, to a factor of 2: in steps of 4 from `start` up or down, then once between."""
    rate = start
    if stable(rate):
        while stable(rate * _FACTOR):
            rate *= _FACTOR
            if rate > start * _FACTOR**PROBES:
                return rate
    else:
        rate /= _FACTOR
        while not stable(rate):
            rate /= _FACTOR
            if rate < start / _FACTOR**PROBES:
                return rate
    middle = rate * math.sqrt(_FACTOR)
    return middle if stable(middle) else rate
