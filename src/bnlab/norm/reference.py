"""Batch normalisation as the paper writes it, slow and in float64: the tests compare every faster way with it.

Ioffe & Szegedy 2015, arXiv 1502.03167: Algorithm 1 (training), its gradients (sec. 3), Algorithm 2 (inference).

Shapes: N examples, C channels, then any number of positions (none, H x W, ...). The m values of a channel, over all
examples and positions, are its mini-batch (sec. 3.2).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Forward(NamedTuple):
    """The results of Algorithm 1: y and what its gradients need. `y` and `x_hat` have the shape of x, the others C."""

    y: Tensor
    x_hat: Tensor
    mean: Tensor
    var: Tensor


class Gradients(NamedTuple):
    """The loss's gradients with respect to x (of its shape), gamma and beta (C each)."""

    x: Tensor
    gamma: Tensor
    beta: Tensor


class Population(NamedTuple):
    """E[x] and Var[x] of Algorithm 2, C each."""

    mean: Tensor
    var: Tensor


def transform(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Forward:
    """Compute Algorithm 1, the batch normalising transform."""
    x, gamma, beta = x.double(), gamma.double(), beta.double()
    mean = x.mean(_all_but_channels(x))  # C
    var = (x - _per_channel(mean, x)).square().mean(_all_but_channels(x))  # C, biased: divided by m
    x_hat = (x - _per_channel(mean, x)) / _per_channel(var + eps, x).sqrt()  # N x C x ...
    y = _per_channel(gamma, x) * x_hat + _per_channel(beta, x)  # N x C x ...
    return Forward(y, x_hat, mean, var)


def gradients(dy: Tensor, x: Tensor, gamma: Tensor, eps: float) -> Gradients:
    """Compute the gradients of sec. 3, line by line; `dy` is the loss's gradient with respect to y."""
    dy, x, gamma = dy.double(), x.double(), gamma.double()
    dims, m = _all_but_channels(x), x.numel() // x.shape[1]
    _, x_hat, mean, var = transform(x, gamma, torch.zeros_like(gamma), eps)
    centred, std = x - _per_channel(mean, x), (var + eps).sqrt()
    dx_hat = dy * _per_channel(gamma, x)
    dvar = (dx_hat * centred).sum(dims) * -0.5 * (var + eps) ** -1.5  # C
    dmean = -dx_hat.sum(dims) / std + dvar * (-2 * centred).mean(dims)  # C; the second term is 0
    dx = dx_hat / _per_channel(std, x) + _per_channel(dvar, x) * 2 * centred / m + _per_channel(dmean, x) / m
    return Gradients(dx, gamma=(dy * x_hat).sum(dims), beta=dy.sum(dims))


def population(batches: Sequence[Tensor]) -> Population:
    """Compute Algorithm 2, step 10: the mean of the batches' means, and m/(m-1) times the mean of their variances.

    Raises:
        ValueError: the batches are not of one size, which the algorithm presumes.
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
    """Compute Algorithm 2, step 11: with fixed statistics, batch normalisation is a linear function."""
    x, gamma, beta, mean, var = (t.double() for t in (x, gamma, beta, mean, var))
    std = (var + eps).sqrt()  # C
    return _per_channel(gamma / std, x) * x + _per_channel(beta - gamma * mean / std, x)  # N x C x ...


def _all_but_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.ndim) if d != 1]


def _per_channel(channels: Tensor, x: Tensor) -> Tensor:
    return channels.view(-1, *[1] * (x.ndim - 2))
