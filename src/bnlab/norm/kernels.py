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

_FAR = 1e5  # the sum over channels of (mean / std)^2 from which values are shifted


class Running(NamedTuple):
    """Running statistics to be moved, in place, by `momentum`: the weight of the new batch."""

    mean: Tensor
    var: Tensor
    momentum: float


class Normalised(NamedTuple):
    """What a batch became.

    `y` was made of `x`, perhaps shifted from what was given, by its `mean` and `invstd`, 1 / sqrt(var + eps). `moved`
    is whether the running statistics were moved: a tensor where that is known on the device alone.
    """

    y: Tensor
    x: Tensor
    mean: Tensor
    invstd: Tensor
    moved: bool | Tensor


def by_batch(x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, eps: float) -> Normalised:
    """Normalise by the batch's own statistics, and move the running ones unless the batch's are not finite."""
    kept = None if running is None else (running.mean.clone(), running.var.clone())
    done = _native(x, weight, bias, running, eps)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        if running is None or kept is None:
            return done
        finite = running.mean.dot(running.var).isfinite()
        _put_back(running, torch.where(finite, running.mean, kept[0]), torch.where(finite, running.var, kept[1]))
        return done._replace(moved=finite)
    ratios = (done.mean * done.invstd).float()
    distance = float(ratios.dot(ratios))
    if distance < _FAR:
        return done
    if running is not None and kept is not None:
        _put_back(running, *kept)
    if not math.isfinite(distance):
        return done._replace(moved=False)
    pilot = x.detach().mean([d for d in range(x.ndim) if d != 1])  # C
    if running is not None:
        running.mean.sub_(pilot)
    done = _native(x - _wide(pilot, x), weight, bias, running, eps)
    if running is not None:
        running.mean.add_(pilot)
    return done


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
    """The y of `by_batch` once more, to the same bits, from the x, mean and invstd it gave.

    The kernel multiplies weight by 1 / sqrt(var + eps): with var 1 and eps 0, that product can be given it as it was.
    """
    scale = invstd if weight is None else weight * invstd
    return torch.batch_norm(x, scale, bias, mean, torch.ones_like(mean), False, 0.0, 0.0, False)


def _native(x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, eps: float) -> Normalised:
    mean, var, momentum = running or (None, None, 0.0)
    y, batch_mean, invstd = torch.native_batch_norm(x, weight, bias, mean, var, True, momentum, eps)
    return Normalised(y, x, batch_mean, invstd, moved=running is not None)


def _put_back(running: Running, mean: Tensor, var: Tensor) -> None:
    running.mean.copy_(mean)
    running.var.copy_(var)


def _wide(channels: Tensor, x: Tensor) -> Tensor:
    """C values, so shaped that they meet x's channels."""
    return channels.view(-1, *[1] * (x.ndim - 2))
