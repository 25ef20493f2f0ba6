"""Errors of a batch that is too large for the memory or too small to normalise by, with what would work."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from bnlab.errors import UsageError
from bnlab.machine import is_out_of_memory, memory_errors
from bnlab.norm import TooFewValuesError
from bnlab.training.build import TrainingContext, scratch_copy
from bnlab.training.loop import train_step


@contextmanager
def batch_errors(context: TrainingContext) -> Iterator[None]:
    """Turn errors of a batch that is too large or too small into ones with a remedy.

    Raises:
        OutOfMemoryError: the memory is full; the remedy is a batch size or a size that was tried and fits.
        UsageError: a normalisation layer has a single value per channel.
    """
    recipe = context.recipe
    try:
        with memory_errors(recipe.batch_size, recipe.size, partial(suggest_batch_size, context)):
            yield
    except TooFewValuesError as error:
        raise UsageError(
            f"a part of a batch has nothing to normalise by ({str(error).splitlines()[0]})",
            "take a larger batch_size, size or ghost batch",
        ) from None


def suggest_batch_size(context: TrainingContext) -> str:
    """A remedy for full memory, tried out on a copy of the network.

    It is the largest batch size that fits of 1/2, 1/4, ... of the recipe's, or the largest size of 3/4, 1/2 and 1/4.
    """
    recipe = context.recipe
    batches = (recipe.batch_size >> n for n in range(1, recipe.batch_size.bit_length() - 1))
    batch = next((b for b in batches if _fits(context, b, recipe.size)), None)
    sizes = (recipe.size * n // 64 * 16 for n in (3, 2, 1))
    size = next((s for s in sizes if s >= context.network.smallest_side and _fits(context, recipe.batch_size, s)), None)
    found = [f"batch_size={batch}"] * (batch is not None) + [f"size={size}"] * (size is not None)
    if not found:
        return "close what else takes memory, or take a network of a smaller width"
    kept = f"; accumulate={recipe.accumulate * recipe.batch_size // batch} keeps the photos of a step" if batch else ""
    return f"{' or '.join(found)} fits{kept}"


def _fits(context: TrainingContext, batch: int, size: int) -> bool:
    photos = batch * context.recipe.accumulate
    pixels = np.zeros((photos, size, size, 3), dtype=np.uint8)
    try:
        train_step(scratch_copy(context), pixels, np.zeros(photos, dtype=np.int64), 0)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        gc.collect()  # what the failed step still holds in reference cycles
        if context.device == "cuda":
            torch.cuda.empty_cache()
    return True
