"""Batch normalisation followed by noise, new in each step, which brings internal covariate shift back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from bnlab.nets.network import TableNetwork
from bnlab.norm.kernels import Running
from bnlab.norm.layers import BatchNorm

SHIFT, SCALE = 0.5, 1.25  # at most: standard deviations while gamma is 1, and a factor
SPREAD = 0.1  # of both, from value to value


class NoisyBatchNorm(BatchNorm):
    """BN whose output y is shifted and scaled in training: y * s + m, with new s and m in each step.

    For each channel, a mean mu ~ U(-0.5, 0.5) and a scale sigma ~ U(1, 1.25) are drawn; then for each value
    m ~ U(mu - 0.1, mu + 0.1) and s ~ N(sigma, 0.1^2). This is the manner of Santurkar et al. 2018; the strengths are
    bnlab's own. Inference has no noise. N x C x ... in and out.

    The noise follows from torch's seed and from `other`. So a step can be repeated with other noise in this layer and
    the same noise in all others.
    """

    other = False

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected N x C x ..., got a {input.ndim}D input")

    def _transform(self, input: Tensor, running: Running | None, *, relu: bool) -> tuple[Tensor, bool | Tensor]:
        if not self.training:
            return super()._transform(input, running, relu=relu)
        y, moved = super()._transform(input, running, relu=False)
        draw = torch.Generator(y.device).manual_seed(2 * int(torch.randint(2**31, ())) + self.other)
        channels = (1, -1) + (1,) * (input.ndim - 2)
        mu = y.new_empty(self.num_features).uniform_(-SHIFT, SHIFT, generator=draw).view(channels)  # 1 x C x 1 ...
        sigma = y.new_empty(self.num_features).uniform_(1, SCALE, generator=draw).view(channels)  # 1 x C x 1 ...
        m = mu + torch.empty_like(y).uniform_(-SPREAD, SPREAD, generator=draw)  # N x C x ...
        s = sigma + torch.empty_like(y).normal_(0, SPREAD, generator=draw)  # N x C x ...
        y = y * s + m
        return F.relu(y, inplace=True) if relu else y, moved


@contextmanager
def other_noise(network: TableNetwork, rows: set[str]) -> Iterator[None]:
    """Other noise in these rows of the network's table, and the same noise in all others."""
    layers = [layer for row in rows for layer in network.get_submodule(row).modules()]
    noisy = [layer for layer in layers if isinstance(layer, NoisyBatchNorm)]
    for layer in noisy:
        layer.other = True
    try:
        yield
    finally:
        for layer in noisy:
            layer.other = False
