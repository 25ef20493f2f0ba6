"""torch's batch normalisation kernels, with what they do not do themselves.

- Where a channel's mean lies far from 0, compared with its standard deviation, the CPU kernel for float32 values that
  lie channels-last loses the variance in rounding (at a mean of 1e6 and a variance of 1e-2 it comes out 2e5 times too
  large), and inference loses the difference of two large numbers. Such values are shifted to about 0 first, which
  batch normalisation does not notice.
- A batch whose statistics are not finite leaves the running statistics as they were.

Shapes: N examples, C channels, then any number of positions; statistics, weight and bias are C each.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bnlab.norm.moments import Moments

_FAR = 1e5  # the sum over channels of (mean / std)^2 from which values are shifted


class Running(NamedTuple):
    """Running statistics to be moved, in place, by `momentum`: the weight of the new batch."""

    mean: Tensor
    var: Tensor
    momentum: float


class Normalised(NamedTuple):
    """What a batch became.

    `y` was made of x, shifted by `pilot` where there is one, by the shifted x's `mean` and `invstd`,
    1 / sqrt(var + eps). `moved` is whether the running statistics were moved: a tensor where that is known on the
    device alone.
    """

    y: Tensor
    pilot: Tensor | None
    mean: Tensor
    invstd: Tensor
    moved: bool | Tensor


def by_batch(x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, eps: float) -> Normalised:
    """Normalise by the batch's own statistics, and move the running ones unless the batch's are not finite."""
    # Copies are moved: autograd keeps what the kernel is given, and would not have it changed in place.
    moving = None if running is None else running._replace(mean=running.mean.clone(), var=running.var.clone())
    done = _native(x, weight, bias, moving, eps)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        if running is None or moving is None:
            return done
        finite = _finite(moving)
        running.mean.copy_(torch.where(finite, moving.mean, running.mean))
        running.var.copy_(torch.where(finite, moving.var, running.var))
        return done._replace(moved=finite)
    ratios = done.mean.float() * done.invstd.float()
    distance = float(ratios.dot(ratios))
    if _FAR <= distance < math.inf:
        pilot = x.detach().mean([d for d in range(x.ndim) if d != 1])  # C
        if running is not None:
            moving = running._replace(mean=running.mean - pilot, var=running.var.clone())
        done = _native(shift(x, pilot), weight, bias, moving, eps)._replace(pilot=pilot)
    if running is None or moving is None:
        return done
    if not math.isfinite(distance) or not bool(_finite(moving)):
        return done._replace(moved=False)
    running.mean.copy_(moving.mean if done.pilot is None else moving.mean + done.pilot)
    running.var.copy_(moving.var)
    return done


def shift(x: Tensor, pilot: Tensor | None) -> Tensor:
    """The x that a batch was normalised from."""
    return x if pilot is None else x - _wide(pilot, x)


def by_statistics(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalise by statistics that are given: a linear function of each channel (paper, Alg. 2, step 11)."""
    if x.device.type == "cpu" and x.dtype != torch.float64 and not torch.compiler.is_compiling():
        ratios = mean.float() * (var.float() + eps).rsqrt()
        if _FAR <= float(ratios.dot(ratios)) < math.inf:
            x, mean = x - _wide(mean.to(x.dtype), x), torch.zeros_like(mean)
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, torch.backends.cudnn.enabled)


def again(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor) -> Tensor:
    """The y of `by_batch` once more, to the same bits, from the (shifted) x, and the mean and invstd it gave.

    The kernel multiplies weight by 1 / sqrt(var + eps): with var 1 and eps 0, that product can be given it as it was.
    """
    scale = invstd if weight is None else weight * invstd
    return torch.batch_norm(x, scale, bias, mean, torch.ones_like(mean), False, 0.0, 0.0, False)


def move(running: Running, found: Moments) -> Tensor:
    """Move running statistics towards those of a batch, unless these are not finite; whether they were, as a tensor."""
    mean = running.mean.lerp(found.mean.to(running.mean), running.momentum)  # C
    var = running.var.lerp(found.variance(unbiased=True).to(running.var), running.momentum)  # C
    finite = _finite(Running(mean, var, running.momentum))
    running.mean.copy_(torch.where(finite, mean, running.mean))
    running.var.copy_(torch.where(finite, var, running.var))
    return finite


def _native(x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, eps: float) -> Normalised:
    mean, var, momentum = running or (None, None, 0.0)
    # What torch.batch_norm calls, to choose cuDNN where there is one, and which gives the statistics too.
    y, batch_mean, invstd, _, _ = torch._batch_norm_impl_index(
        x, weight, bias, mean, var, True, momentum, eps, torch.backends.cudnn.enabled
    )
    return Normalised(y, None, batch_mean, invstd, moved=running is not None)


def _finite(running: Running) -> Tensor:
    return running.mean.float().dot(running.var.float()).isfinite()


def _wide(channels: Tensor, x: Tensor) -> Tensor:
    """C values, so shaped that they meet x's channels."""
    return channels.view(-1, *[1] * (x.ndim - 2))
