"""What would fit, where a batch did not fit into the memory of the device."""

import gc

import numpy as np
import torch

from bnlab.machine import is_out_of_memory
from bnlab.training.build import scratch_copy
from bnlab.training.loop import TrainingContext, train_step


def suggest_batch_size(context: TrainingContext) -> str:
    """A remedy for full memory, tried out on a copy of the network: the largest batch that fits, of 1/2, 1/4, ... of
    the recipe's, or the largest size, of 3/4, 1/2, ..."""
    recipe = context.recipe
    batches = (recipe.batch_size >> n for n in range(1, recipe.batch_size.bit_length() - 1))
    batch = next((b for b in batches if _fits(context, b, recipe.size)), None)
    sizes = (recipe.size * n // 64 * 16 for n in (3, 2, 1))
    size = next((s for s in sizes if s >= context.network.smallest_side and _fits(context, recipe.batch_size, s)), None)
    found = [f"--batch-size {batch}"] * (batch is not None) + [f"--size {size}"] * (size is not None)
    if not found:
        return "close what else takes memory, or take a network of a smaller width"
    return f"{' or '.join(found)} fits"


def _fits(context: TrainingContext, batch: int, size: int) -> bool:
    """Whether a step does."""
    pixels = np.zeros((batch, size, size, 3), dtype=np.uint8)
    try:
        one = scratch_copy(context)
        train_step(one, pixels, np.zeros(batch, dtype=np.int64), 0)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        gc.collect()  # what the failed step still holds in cycles
        if context.device == "cuda":
            torch.cuda.empty_cache()
    return True
