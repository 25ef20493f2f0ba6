"""Gradient accumulation whose running statistics move as far as with one large batch."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.norm.whitening import Whitening


@contextmanager
def accumulate(model: nn.Module, steps: int) -> Iterator[None]:
    """Within this context, `steps` batches together move the running statistics as far as one batch does otherwise.

    Each batch moves them by 1 - (1 - m)^(1 / steps), so that after all of them the old values weigh 1 - m, as they do
    after one batch with momentum m. (Each batch is still normalised by itself, and the later ones weigh a little more.)
    A cumulative average (momentum None) is not changed. The momenta are restored at the end.

        with norm.accumulate(network, 4):
            train(...)  # an optimiser step after every fourth backward

    Raises:
        ValueError: steps is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps is the number of batches to an optimiser step, at least 1, not {steps}")
    before = {m: m.momentum for m in model.modules() if isinstance(m, _BatchNorm | Whitening)}
    try:
        for layer, momentum in before.items():
            if momentum is not None and steps > 1:  # the formula would round it
                layer.momentum = 1 - (1 - momentum) ** (1 / steps)
        yield
    finally:
        for layer, momentum in before.items():
            layer.momentum = momentum
