"""What follows from how far a training is: its learning rate and the size of its photos, as pure functions."""

import math
from dataclasses import dataclass, replace
from typing import assert_never

from bnlab.recipe import Recipe

_GRID = 16  # pixels by which sizes grow
_SMALLEST = 32  # pixels that every network can see


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many steps a training has. It may be changed on the way: what is left then passes the quicker or slower."""

    steps: int
    """in all"""
    batches: int
    """to an epoch"""
    wanted: int = 0
    """steps it had at first, where it was changed"""
    since: int = 0
    """the step at which it was last changed"""
    progress_then: float = 0.0
    """and how far the training was"""

    @classmethod
    def of(cls, recipe: Recipe, batches: int) -> "Plan":
        """The recipe's, with so many batches to an epoch."""
        return cls(steps=recipe.steps or recipe.epochs * batches, batches=batches)

    @property
    def epochs(self) -> int:
        """How many there are, the last of them perhaps not whole."""
        return -(-self.steps // self.batches)

    def progress(self, step: int) -> float:
        """How far the training is after so many steps, in 0..1."""
        left = (step - self.since) / (self.steps - self.since)
        return self.progress_then + left * (1 - self.progress_then)

    def changed(self, step: int, steps: int) -> "Plan":
        """The same training, from `step` on with so many steps in all."""
        wanted = self.wanted or self.steps
        return replace(self, steps=steps, wanted=wanted, since=step, progress_then=self.progress(step))

    def learning_rate(self, recipe: Recipe, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
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
        """The side of the photos in an epoch, counted from 0: each has an equal share, and the last epoch `size`."""
        first = min(recipe.size, max(_SMALLEST, _GRID * round(recipe.start_size * recipe.size / _GRID)))
        if recipe.start_size == 1:
            first = recipe.size
        sides = 1 + -(-(recipe.size - first) // _GRID)
        done = min(1.0, self.progress((epoch + 1) * self.batches))  # at its end
        return min(recipe.size, first + _GRID * max(0, math.ceil(sides * done - 1e-9) - 1))

    def validates(self, recipe: Recipe, epoch: int) -> bool:
        """Whether the network is judged after an epoch, counted from 0."""
        every = recipe.validate_every or -(-self.epochs // 10)
        return (epoch + 1) % every == 0 or epoch + 1 >= self.epochs


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """How fast a training with a time to keep was planned to be."""

    steps: dict[int, float]
    """size to seconds of a step"""
    validation: float
    """seconds of a judgement"""
    last: float
    """seconds after the last judgement: the best is read back and judged once more, and the report written"""

    def seconds(self, plan: Plan, recipe: Recipe, epoch: int = 0, step: int = 0, size: int = 0) -> float:
        """Of the rest of a plan, from a step of an epoch, whose size is given where it has begun."""
        seconds = 0.0
        for later in range(epoch, plan.epochs):
            last = min(plan.steps, (later + 1) * plan.batches)
            side = size if size and later == epoch else plan.size(recipe, later)
            seconds += (last - max(step, later * plan.batches)) * self._step_of(side)
        return seconds

    def _step_of(self, size: int) -> float:
        """Seconds of a step at the size that was measured nearest to this."""
        return self.steps[min(self.steps, key=lambda measured: abs(measured - size))]


def _one_cycle(progress: float, warmup: float) -> float:
    """Linear from 0 up to 1 over the warm-up, then down a half cosine to 1e-4, so that the last step still counts."""
    if progress < warmup:
        return progress / warmup
    if warmup >= 1:
        return 1.0
    left = (progress - warmup) / (1 - warmup)
    return max(0.5 * (1 + math.cos(math.pi * left)), 1e-4)
