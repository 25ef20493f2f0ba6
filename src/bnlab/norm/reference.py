"""Batch normalisation as the paper writes it, slowly, in float64: what every faster way is held against.

Ioffe & Szegedy 2015, arXiv 1502.03167: Algorithm 1 (training), its gradients (sec. 3), Algorithm 2 (inference).

Shapes: N examples, C channels, then any number of positions (none, H x W, ...). A channel's values over all examples
and positions are its mini-batch (sec. 3.2), m of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Forward(NamedTuple):
    """What Algorithm 1 computes: y and what its gradients need. `x_hat` has the shape of x, the others C."""

    y: Tensor
    x_hat: Tensor
    mean: Tensor
    var: Tensor


class Gradients(NamedTuple):
    """The loss's gradient in x (its shape), gamma and beta (C each)."""

    x: Tensor
    gamma: Tensor
    beta: Tensor


class Population(NamedTuple):
    """E[x] and Var[x] of Algorithm 2, C each."""

    mean: Tensor
    var: Tensor


def transform(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Forward:
    """Algorithm 1: the batch normalising transform."""
    x, gamma, beta = x.double(), gamma.double(), beta.double()
    mean = x.mean(_examples(x))  # C
    var = (x - _wide(mean, x)).square().mean(_examples(x))  # C, biased: divided by m
    x_hat = (x - _wide(mean, x)) / _wide(var + eps, x).sqrt()  # N x C x ...
    y = _wide(gamma, x) * x_hat + _wide(beta, x)  # N x C x ...
    return Forward(y, x_hat, mean, var)


def gradients(dy: Tensor, x: Tensor, gamma: Tensor, eps: float) -> Gradients:
    """The gradients of sec. 3, line by line; `dy` is the loss's gradient in y."""
    dy, x, gamma = dy.double(), x.double(), gamma.double()
    over, m = _examples(x), x.numel() // x.shape[1]
    _, x_hat, mean, var = transform(x, gamma, torch.zeros_like(gamma), eps)
    centred, std = x - _wide(mean, x), (var + eps).sqrt()
    dx_hat = dy * _wide(gamma, x)
    dvar = (dx_hat * centred).sum(over) * -0.5 * (var + eps) ** -1.5  # C
    dmean = -dx_hat.sum(over) / std + dvar * (-2 * centred).mean(over)  # C; the second term is 0
    dx = dx_hat / _wide(std, x) + _wide(dvar, x) * 2 * centred / m + _wide(dmean, x) / m
    return Gradients(dx, gamma=(dy * x_hat).sum(over), beta=dy.sum(over))


def population(batches: Sequence[Tensor]) -> Population:
    """Algorithm 2, step 10: the mean of the batches' means, and m/(m-1) times the mean of their variances.

    Raises:
        ValueError: the batches are not of one size, as the algorithm has them.
    """
    sizes = {batch.numel() // batch.shape[1] for batch in batches}
    if len(sizes) != 1:
        raise ValueError(f"Algorithm 2 is for batches of one size, not {sorted(sizes)} values a channel")
    (m,) = sizes
    zero = torch.zeros(batches[0].shape[1], dtype=torch.float64)
    steps = [transform(batch, zero, zero, 0.0) for batch in batches]
    mean = torch.stack([step.mean for step in steps]).mean(0)  # C
    var = torch.stack([step.var for step in steps]).mean(0) * m / (m - 1)  # C
    return Population(mean, var)


def inference(x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Algorithm 2, step 11: the linear function that batch normalisation is once the statistics are fixed."""
    x, gamma, beta, mean, var = (t.double() for t in (x, gamma, beta, mean, var))
    std = (var + eps).sqrt()  # C
    return _wide(gamma / std, x) * x + _wide(beta - gamma * mean / std, x)  # N x C x ...


def _examples(x: Tensor) -> list[int]:
    """All dimensions but the channel's."""
    return [d for d in range(x.ndim) if d != 1]


def _wide(channels: Tensor, x: Tensor) -> Tensor:
    """C values, so shaped that they meet x's channels."""
    return channels.view(-1, *[1] * (x.ndim - 2))
