"""The schedules: learning rate and size of the photos as pure functions of the step."""

import math
from dataclasses import dataclass, replace
from typing import assert_never

import numpy as np

from bnlab.recipe import Recipe

_GRID = 16  # pixels by which sizes grow
_SMALLEST = 32  # pixels; every network accepts this size
_SAMPLED = 100  # epochs whose steps are looked up to add up the seconds of a long plan


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many steps a training has. If that changes on the way, the rest of the schedule shrinks or stretches."""

    steps: int
    batches: int  # batches in an epoch
    every: int = 0  # epochs between validations; 0: about ten validations in all
    changes: tuple[tuple[int, int, int], ...] = ()
    """the key `plan` of a recipe that has this plan: all (step, steps, every) since step 0"""
    since: int = 0  # the step at which the plan was last changed
    progress_then: float = 0.0  # progress of the training at that step, in 0..1

    @classmethod
    def of(cls, recipe: Recipe, batches: int) -> "Plan":
        if recipe.plan:
            return cls(steps=1, batches=batches).changed(*recipe.plan[0])
        return cls(steps=recipe.steps or recipe.epochs * batches, batches=batches, every=recipe.validate_every)

    @property
    def epochs(self) -> int:
        """Number of epochs; the last may be incomplete."""
        return -(-self.steps // self.batches)

    def progress(self, step: int) -> float:
        """Progress of the training after so many steps, in 0..1."""
        left = (step - self.since) / (self.steps - self.since)
        return self.progress_then + left * (1 - self.progress_then)

    def changed(self, step: int, steps: int, every: int) -> "Plan":
        """The same training, which from `step` on has so many steps in total and validates every `every` epochs."""
        return replace(
            self,
            steps=steps,
            every=every,
            changes=(*(change for change in self.changes if change[0] < step), (step, steps, every)),
            since=step,
            progress_then=self.progress(step),
        )

    def repeated(self, recipe: Recipe, step: int) -> "Plan":
        """The plan from `step` on, if the recipe repeats a training whose plan changed there."""
        for then, steps, every in recipe.plan[1:]:
            if then == step:
                return self.changed(then, steps, every)
        return self

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

    def validates(self, epoch: int) -> bool:
        """Whether the network is validated after an epoch, counted from 0."""
        every = self.every or -(-self.epochs // 10)
        return (epoch + 1) % every == 0 or epoch + 1 >= self.epochs

    def validations(self, epoch: int) -> int:
        """The number of validations from an epoch on."""
        every = self.every or -(-self.epochs // 10)
        return self.epochs // every - epoch // every + (self.epochs % every > 0)


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """The measured seconds from which a training with a time budget is planned."""

    steps: dict[int, float]  # seconds of a step, by the size of the photos, once the photos are in the cache
    reading: float = 0.0  # seconds that a step takes longer while the photos are read for the first time
    validation: float  # seconds of a validation
    last: float
    """seconds after the last validation, in which the best classifier is evaluated again and the report is written"""
    slowness: float = 1.0  # factor on all of these: how much slower the machine is than when they were measured

    def of_step(self, size: int) -> float:
        """Seconds of a step on photos of this size, in proportion to their area between the measured sizes."""
        known = sorted(self.steps)
        return float(np.interp(size**2, [side**2 for side in known], [self.steps[side] for side in known]))

    def seconds(
        self, plan: Plan, recipe: Recipe, *, epoch: int = 0, step: int = 0, size: int = 0, reads: range = range(0)
    ) -> float:
        """Seconds from a step of an epoch to the end of everything, by this plan.

        `size` is that of the epoch, if it has begun; the steps in `reads` read their photos for the first time.
        """
        seconds = self.reading * len(range(max(step, reads.start), min(plan.steps, reads.stop)))
        stride = max(1, (plan.epochs - epoch) // _SAMPLED)
        for first in range(epoch, plan.epochs, stride):
            last = min(plan.steps, (first + stride) * plan.batches)
            side = max(size if first == epoch else 0, plan.size(recipe, min(first + stride // 2, plan.epochs - 1)))
            seconds += (last - max(step, first * plan.batches)) * self.of_step(side)
        return self.slowness * (seconds + plan.validations(epoch) * self.validation + self.last)


def _one_cycle(progress: float, warmup: float) -> float:
    """Linear from 0 to 1 over the warm-up, then a half cosine to 1e-4, so that the last step still has an effect."""
    if progress < warmup:
        return progress / warmup
    if warmup >= 1:
        return 1.0
    left = (progress - warmup) / (1 - warmup)
    return max(0.5 * (1 + math.cos(math.pi * left)), 1e-4)
