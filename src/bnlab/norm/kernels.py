"""torch's batch normalisation kernels, with what they do not do themselves.

- Where a channel's mean lies far from 0, compared with its standard deviation, the CPU kernel for float32 values that
  lie channels-last loses the variance in rounding (at a mean of 1e6 and a variance of 1e-2 it comes out 2e5 times too
  large), and inference loses the difference of two large numbers. Such values are shifted to about 0 first, which
  batch normalisation does not notice.
- A batch whose statistics are not finite leaves the running statistics as they were.

Shapes: N examples, C channels, then any number of positions; statistics, weight and bias are C each.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnlab.norm.moments import Moments

_FAR = 1e5  # the sum over channels of (mean / std)^2 from which values are shifted


class Running(NamedTuple):
    """Running statistics to be moved, in place, by `momentum`: the weight of the new batch."""

    mean: Tensor
    var: Tensor
    momentum: float


_NOTHING: Any = (None, None, 0.0)


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
    if not x.is_cpu or torch.compiler.is_compiling():
        return _unseen(x, weight, bias, running, eps)
    mean, var, momentum = running or _NOTHING
    kept = None if running is None else Running(mean.clone(), var.clone(), momentum)
    y, batch_mean, invstd = torch.native_batch_norm(x, weight, bias, mean, var, True, momentum, eps)
    ratios = batch_mean * invstd  # C
    if float(ratios.dot(ratios)) < _FAR and (running is None or math.isfinite(float(mean.dot(var)))):
        return Normalised(y, None, batch_mean, invstd, running is not None)
    return _with_care(x, weight, bias, running, kept, eps)


def _with_care(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, kept: Running | None, eps: float
) -> Normalised:
    """The same for values that are, or seem to be, far from 0 or not finite; `kept` is what running was."""
    if running is not None and kept is not None:
        _put(running, kept.mean, kept.var)
    done = _native(x, weight, bias, None, eps)
    ratios = done.mean.float() * done.invstd.float()
    pilot = None
    if _FAR <= float(ratios.dot(ratios)) < math.inf:
        pilot = x.detach().mean([d for d in range(x.ndim) if d != 1])  # C
        kept = None if kept is None else kept._replace(mean=kept.mean - pilot)
    done = _native(shift(x, pilot), weight, bias, kept, eps)._replace(pilot=pilot)
    if running is None or kept is None:
        return done
    if not bool(_finite(kept)):
        return done._replace(moved=False)
    _put(running, kept.mean if pilot is None else kept.mean + pilot, kept.var)
    return done


def _unseen(x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, eps: float) -> Normalised:
    """The same without a look at the values, for which a device would have to wait; no kernel there needs the care."""
    if running is None:
        return _native(x, weight, bias, None, eps)
    moving = running._replace(mean=running.mean.clone(), var=running.var.clone())
    done = _native(x, weight, bias, moving, eps)
    finite = _finite(moving)
    _put(running, torch.where(finite, moving.mean, running.mean), torch.where(finite, moving.var, running.var))
    return done._replace(moved=finite)


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
    _put(running, torch.where(finite, mean, running.mean), torch.where(finite, var, running.var))
    return finite


def _native(x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, eps: float) -> Normalised:
    mean, var, momentum = running or _NOTHING
    # What torch.batch_norm calls, to choose cuDNN where there is one, and which gives the statistics too.
    y, batch_mean, invstd, _, _ = torch._batch_norm_impl_index(
        x, weight, bias, mean, var, True, momentum, eps, torch.backends.cudnn.enabled
    )
    return Normalised(y, None, batch_mean, invstd, moved=running is not None)


def _finite(running: Running) -> Tensor:
    return running.mean.isfinite().all() & running.var.isfinite().all()


@torch.no_grad()
def _put(running: Running, mean: Tensor, var: Tensor) -> None:
    """Write the statistics. Autograd keeps what the kernel was given: it is not to notice, for it does not use it."""
    running.mean.data.copy_(mean)
    running.var.data.copy_(var)


def _wide(channels: Tensor, x: Tensor) -> Tensor:
    """C values, so shaped that they meet x's channels."""
    return channels.view(-1, *[1] * (x.ndim - 2))
