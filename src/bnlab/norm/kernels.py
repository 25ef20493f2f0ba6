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
from torch import Tensor, nn

from bnlab.norm.moments import Moments

_FAR = 1e6  # the sum over channels of (mean / std)^2 from which values are shifted: one channel 1,000 std from 0


class Running(NamedTuple):
    """Running statistics to be moved, in place, by `momentum`: the weight of the new batch."""

    mean: Tensor
    var: Tensor
    momentum: float


_NOTHING: Any = (None, None, 0.0)


class Normalised(NamedTuple):
    """What a batch became.

    `y` was made of x, shifted by `shift` where there is one, by the shifted x's `mean` and `invstd`,
    1 / sqrt(var + eps). `moved` is whether the running statistics were moved: a tensor where that is known on the
    device alone.
    """

    y: Tensor
    shift: Tensor | None
    mean: Tensor
    invstd: Tensor
    moved: bool | Tensor


def by_batch(x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, eps: float) -> Normalised:
    """Normalise by the batch's own statistics, and move the running ones unless the batch's are not finite."""
    if not _can_read_values(x):
        return _normalise_without_sync(x, weight, bias, running, eps)
    mean, var, momentum = running or _NOTHING
    kept = None if running is None else Running(mean.clone(), var.clone(), momentum)
    y, batch_mean, invstd = torch.native_batch_norm(x, weight, bias, mean, var, True, momentum, eps)
    ratios = batch_mean * invstd  # C
    distance = float(ratios.dot(ratios))
    if distance < _FAR and (running is None or math.isfinite(float(mean.dot(var)))):
        return Normalised(y, None, batch_mean, invstd, running is not None)
    if running is not None and kept is not None:
        _put_back(running, kept)
    return _normalise_shifted(x, weight, bias, running, eps, batch_mean.float() * invstd.float())


def _normalise_shifted(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, eps: float, ratios: Tensor
) -> Normalised:
    """The same for values that are, or seem to be, far from 0 or not finite; `ratios` are mean / std, C."""
    shift = None
    if _FAR <= float(ratios.dot(ratios)) < math.inf:
        shift = x.detach().mean([d for d in range(x.ndim) if d != 1])  # C
    # Copies are moved: autograd keeps what the kernel is given, and would not have it changed in place.
    moving = None if running is None else running._replace(mean=running.mean.clone(), var=running.var.clone())
    if moving is not None and shift is not None:
        moving.mean.sub_(shift)
    done = _native(shifted(x, shift), weight, bias, moving, eps)._replace(shift=shift)
    if running is None or moving is None:
        return done
    if not bool(_finite(moving)):
        return done._replace(moved=False)
    running.mean.copy_(moving.mean if shift is None else moving.mean + shift)
    running.var.copy_(moving.var)
    return done


def _normalise_without_sync(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, eps: float
) -> Normalised:
    """The same without a look at the values."""
    if running is None:
        return _native(x, weight, bias, None, eps)
    moving = running._replace(mean=running.mean.clone(), var=running.var.clone())
    done = _native(x, weight, bias, moving, eps)
    finite = _finite(moving)
    running.mean.copy_(torch.where(finite, moving.mean, running.mean))
    running.var.copy_(torch.where(finite, moving.var, running.var))
    return done._replace(moved=finite)


def shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    """The x that a batch was normalised from."""
    return x if shift is None else x - _wide(shift, x)


def by_statistics(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalise by statistics that are given: a linear function of each channel (paper, Alg. 2, step 11)."""
    if x.dtype != torch.float64 and _can_read_values(x):
        ratios = mean.float() * (var.float() + eps).rsqrt()
        if _FAR <= float(ratios.dot(ratios)) < math.inf:
            shift = mean.to(x.dtype)  # C
            if shift.isfinite().all():
                x, mean = x - _wide(shift, x), mean - shift.to(mean.dtype)
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
    mean, var, momentum = running or _NOTHING
    # What torch.batch_norm calls, to choose cuDNN where there is one, and which gives the statistics too.
    y, batch_mean, invstd, _, _ = torch._batch_norm_impl_index(
        x, weight, bias, mean, var, True, momentum, eps, torch.backends.cudnn.enabled
    )
    return Normalised(y, None, batch_mean, invstd, moved=running is not None)


def _can_read_values(x: Tensor) -> bool:
    """Whether x has values to look at: a GPU would have to be waited for, and in a trace or a vmap there are none."""
    return (
        x.is_cpu
        and type(x) in (Tensor, nn.Parameter)
        and not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch._C._is_tracing())
    )


def _finite(running: Running) -> Tensor:
    return running.mean.isfinite().all() & running.var.isfinite().all()


def _put_back(running: Running, kept: Running) -> None:
    """Undo the kernel's move as it was made, without autograd's notice, for the discarded y holds them still."""
    running.mean.data.copy_(kept.mean)
    running.var.data.copy_(kept.var)


def _wide(channels: Tensor, x: Tensor) -> Tensor:
    """C values, so shaped that they meet x's channels."""
    return channels.view(-1, *[1] * (x.ndim - 2))
