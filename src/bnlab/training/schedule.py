"""The learning rate as a pure function of the step."""

import math
from typing import assert_never

from bnlab.config import Recipe


def learning_rate(recipe: Recipe, step: int, total: int) -> float:
    """The learning rate of step `step` of `total`, counted from 0."""
    highest = recipe.learning_rate
    match recipe.schedule:
        case "constant":
            return highest
        case "step":
            return float(highest * recipe.step_factor ** (step // recipe.step_every))
        case "one-cycle":
            return highest * _one_cycle((step + 1) / total, recipe.warmup)
        case unknown:
            assert_never(unknown)


def _one_cycle(progress: float, warmup: float) -> float:
    """Linear from 0 up to 1 over the warm-up, then down a half cosine to 1e-4, so that the last step still counts."""
    if progress < warmup:
        return progress / warmup
    if warmup >= 1:
        return 1.0
    left = (progress - warmup) / (1 - warmup)
    return max(0.5 * (1 + math.cos(math.pi * left)), 1e-4)
