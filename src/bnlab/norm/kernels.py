"""torch's batch normalisation kernels, with two things that they lack.

- Where a channel's mean lies far from 0, compared with its standard deviation, the CPU kernel for float32 values in
  channels-last order loses the variance in rounding (at a mean of 1e6 and a variance of 1e-2 the result is 2e5 times
  too large), and inference loses the difference of two large numbers. Such values are first shifted to about 0, which
  does not change what batch normalisation computes.
- A batch whose statistics are not finite leaves the running statistics unchanged.

Shapes: N examples, C channels, then any number of positions; statistics, weight and bias are C each.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnlab.norm.moments import Moments

_FAR = 1e6  # the sum over channels of (mean / std)^2 from which values are shifted: one channel 1,000 std from 0


class Running(NamedTuple):
    """Running statistics to be updated in place by `momentum`, the weight of the new batch."""

    mean: Tensor
    var: Tensor
    momentum: float


class Normalised(NamedTuple):
    """A normalised batch `y`, and how it was computed.

    `shift` was subtracted from x first, unless it is None; `mean` and `invstd`, 1 / sqrt(var + eps), are those of the
    shifted x. `updated` is whether the running statistics were updated: a tensor where only the device knows it.
    """

    y: Tensor
    shift: Tensor | None
    mean: Tensor
    invstd: Tensor
    updated: bool | Tensor


def by_batch(x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, eps: float) -> Normalised:
    """Normalise by the batch's own statistics, and update the running ones unless the result is not finite."""
    can_read = _can_read_values(x) and x.numel() > 0  # the kernel does not set the statistics of an empty batch
    normalised, new = _native(x, None, weight, bias, running, eps)
    if can_read and _is_far(normalised.mean, normalised.invstd):
        shift = x.detach().mean([d for d in range(x.ndim) if d != 1])  # C
        normalised, new = _native(x, shift, weight, bias, running, eps)
    if running is None or new is None:
        return normalised
    if can_read and math.isfinite(float(new.mean.dot(new.var))):  # the usual case, which takes fewer steps
        running.mean.copy_(new.mean)
        running.var.copy_(new.var)
        return normalised._replace(updated=True)
    return normalised._replace(updated=_store_if_finite(running, new))


def _native(
    x: Tensor, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None, running: Running | None, eps: float
) -> tuple[Normalised, Running | None]:
    """Normalise x - shift by its own statistics; return also what the running statistics become, which are not changed.

    The kernel updates copies: autograd keeps what the kernel gets, and refuses a later change in place.
    """
    mean = var = None
    momentum = 0.0
    if running is not None:
        mean, var, momentum = shifted(running.mean, shift).clone(), running.var.clone(), running.momentum
    # torch.batch_norm calls this, which chooses cuDNN where there is one; unlike it, this returns the statistics too.
    y, batch_mean, invstd, _, _ = torch._batch_norm_impl_index(
        shifted(x, shift), weight, bias, mean, var, True, momentum, eps, torch.backends.cudnn.enabled
    )
    new = None if mean is None or var is None else Running(mean if shift is None else mean + shift, var, momentum)
    return Normalised(y, shift, batch_mean, invstd, updated=False), new


def shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    """Return x - shift for each channel, N x C x ... or C; x itself where there is no shift."""
    return x if shift is None else x - shift.view(-1, *[1] * (x.ndim - 2))


def by_statistics(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalise by given statistics, a linear function of each channel (paper, Alg. 2, step 11)."""
    if x.dtype != torch.float64 and _can_read_values(x) and _is_far(mean, (var.float() + eps).rsqrt()):
        shift = mean.to(x.dtype)  # C
        if shift.isfinite().all():
            x, mean = shifted(x, shift), mean - shift.to(mean.dtype)
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, torch.backends.cudnn.enabled)


def _is_far(mean: Tensor, invstd: Tensor) -> bool:
    """Whether values of this mean and 1 / std, C each, are to be shifted; not where these are not finite."""
    ratios = mean.float() * invstd.float()  # C
    return _FAR <= float(ratios.dot(ratios)) < math.inf


def recompute(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor) -> Tensor:
    """Compute the y of `by_batch` again, to the same bits, from the shifted x and the mean and invstd of that batch.

    The kernel multiplies weight by 1 / sqrt(var + eps). With var 1 and eps 0, it uses the product passed as weight.
    """
    scale = invstd if weight is None else weight * invstd
    return torch.batch_norm(x, scale, bias, mean, torch.ones_like(mean), False, 0.0, 0.0, False)


def update_running(running: Running, batch: Moments) -> Tensor:
    """Move running statistics towards those of a batch, unless the result is not finite; return whether it was."""
    mean = running.mean.lerp(batch.mean.to(running.mean), running.momentum)  # C
    var = running.var.lerp(batch.variance(unbiased=True).to(running.var), running.momentum)  # C
    return _store_if_finite(running, Running(mean, var, running.momentum))


def _store_if_finite(running: Running, new: Running) -> Tensor:
    finite = new.mean.isfinite().all() & new.var.isfinite().all()
    running.mean.copy_(torch.where(finite, new.mean, running.mean))
    running.var.copy_(torch.where(finite, new.var, running.var))
    return finite


def _can_read_values(x: Tensor) -> bool:
    """Whether reading values of x is possible and free: a GPU makes the host wait, a trace or a vmap has no values."""
    return (
        x.is_cpu
        and type(x) in (Tensor, nn.Parameter)
        and not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch._C._is_tracing())
    )
