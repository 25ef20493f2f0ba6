"""Inference-example weighing: mix each example's own statistics into those that inference normalises by.

Training normalises each example by a batch that contains it; plain inference does not, so an example has less
influence on its own normalisation than the weights were trained for. Weighing it by `weight` (the share of a batch of B
is 1/B) gives it back: Summers & Dinneen 2020, "Four things everyone should know to improve batch normalization",
arXiv 1906.03548, sec. 3.1, who choose the weight on validation data. Mixed are the first two moments, E[x] and E[x^2].

Shapes: N examples, C channels, then any number of positions.
"""

import torch
from torch import Tensor


def normalise(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, weight: float
) -> Tensor:
    """x normalised by (1 - weight) of the statistics given (C each) and `weight` of each example's own.

    The mixture's variance is (1 - w) var + w var_own + w (1 - w) (mean - mean_own)^2: E[x^2] - E[x]^2 without their
    cancellation.
    """
    held, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))  # squares would not fit into float16
    wide = (1, -1, *[1] * (x.ndim - 2))
    mean, var = mean.view(wide), var.view(wide)  # 1 x C x 1 ...
    own_mean, own_var = x, x.new_zeros(())  # one value is its own mean
    if x.ndim > 2:
        over = list(range(2, x.ndim))
        own_mean = x.mean(over, keepdim=True)  # N x C x 1 ...
        own_var = (x - own_mean).square().mean(over, keepdim=True)
    apart = own_mean - mean
    mixed_var = (1 - weight) * var + weight * own_var + weight * (1 - weight) * apart.square()
    y = (x - mean - weight * apart) * (mixed_var + eps).rsqrt()  # N x C x ...
    if gamma is not None:
        y = y * gamma.view(wide)
    return (y if beta is None else y + beta.view(wide)).to(held)
