"""The schedules: learning rate and size of the photos as pure functions of the step."""

import math
from dataclasses import dataclass, replace
from typing import assert_never

from bnlab.recipe import Recipe

_GRID = 16  # pixels by which sizes grow
_SMALLEST = 32  # pixels; every network accepts this size


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many steps a training has. If that changes on the way, the rest of the schedule shrinks or stretches."""

    steps: int
    batches: int  # batches in an epoch
    wanted: int = 0  # the steps of the first plan, if it was changed
    since: int = 0  # the step at which the plan was last changed
    progress_then: float = 0.0  # progress of the training at that step, in 0..1

    @classmethod
    def of(cls, recipe: Recipe, batches: int) -> "Plan":
        return cls(steps=recipe.steps or recipe.epochs * batches, batches=batches)

    @property
    def epochs(self) -> int:
        """Number of epochs; the last may be incomplete."""
        return -(-self.steps // self.batches)

    def progress(self, step: int) -> float:
        """Progress of the training after so many steps, in 0..1."""
        left = (step - self.since) / (self.steps - self.since)
        return self.progress_then + left * (1 - self.progress_then)

    def changed(self, step: int, steps: int) -> "Plan":
        """The same training, which from `step` on has so many steps in total."""
        wanted = self.wanted or self.steps
        return replace(self, steps=steps, wanted=wanted, since=step, progress_then=self.progress(step))

    def learning_rate(self, recipe: Recipe, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        highest = recipe.learning_rate
        match recipe.schedule:
            case "constant":
                return highest
            case "step":
                return float(highest * recipe.step_factor ** (step // recipe.step_every))
            case "exponential":
                return float(highest * recipe.decay_factor ** (step / (recipe.decay_epochs * self.batches)))
            case "one-cycle":
                return highest * _one_cycle(self.progress(step + 1), recipe.warmup)
            case unknown:
                assert_never(unknown)

    def size(self, recipe: Recipe, epoch: int) -> int:
        """The side of the photos in an epoch, counted from 0. Each size is trained equally long; the last is `size`."""
        first = min(recipe.size, max(_SMALLEST, _GRID * round(recipe.start_size * recipe.size / _GRID)))
        if recipe.start_size == 1:
            first = recipe.size
        sides = 1 + -(-(recipe.size - first) // _GRID)
        done = min(1.0, self.progress((epoch + 1) * self.batches))  # at the end of the epoch
        return min(recipe.size, first + _GRID * max(0, math.ceil(sides * done - 1e-9) - 1))

    def validates(self, recipe: Recipe, epoch: int) -> bool:
        """Whether the network is validated after an epoch, counted from 0."""
        every = recipe.validate_every or -(-self.epochs // 10)
        return (epoch + 1) % every == 0 or epoch + 1 >= self.epochs


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """The measured seconds from which a training with a time budget is planned."""

    steps: dict[int, float]  # seconds of a step, by the size of the photos
    validation: float  # seconds of a validation
    last: float
    """seconds after the last validation, in which the best classifier is evaluated again and the report is written"""

    def seconds(self, plan: Plan, recipe: Recipe, epoch: int = 0, step: int = 0, size: int = 0) -> float:
        """Seconds of the rest of a plan, from a step of an epoch; `size` is that of the epoch, if it has begun."""
        seconds = 0.0
        for later in range(epoch, plan.epochs):
            last = min(plan.steps, (later + 1) * plan.batches)
            side = size if size and later == epoch else plan.size(recipe, later)
            measured = min(self.steps, key=lambda known: abs(known - side))
            seconds += (last - max(step, later * plan.batches)) * self.steps[measured]
        return seconds


def _one_cycle(progress: float, warmup: float) -> float:
    """Linear from 0 to 1 over the warm-up, then a half cosine to 1e-4, so that the last step still has an effect."""
    if progress < warmup:
        return progress / warmup
    if warmup >= 1:
        return 1.0
    left = (progress - warmup) / (1 - warmup)
    return max(0.5 * (1 + math.cos(math.pi * left)), 1e-4)
