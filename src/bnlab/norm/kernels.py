"""torch's batch normalisation kernels, with two things that they lack.

- Where a channel's mean lies far from 0, compared with its standard deviation, the CPU kernel for float32 values in
  channels-last order loses the variance in rounding (at a mean of 1e6 and a variance of 1e-2 the result is 2e5 times
  too large), and inference loses the difference of two large numbers. Such values are first shifted to about 0, which
  does not change what batch normalisation computes.
- A batch whose statistics are not finite leaves the running statistics unchanged.

Shapes: N examples, C channels, then any number of positions; statistics, weight and bias are C each.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnlab.norm.moments import Moments

_FAR = 1e6  # the sum over channels of (mean / std)^2 from which values are shifted: one channel 1,000 std from 0


class Running(NamedTuple):
    """Running statistics to be updated in place by `momentum`, the weight of the new batch."""

    mean: Tensor
    var: Tensor
    momentum: float


_NOTHING: Any = (None, None, 0.0)


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
    """Normalise by the batch's own statistics, and update the running ones unless the batch's are not finite."""
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
        # Undo the update without telling autograd, for the discarded y still holds the running statistics.
        running.mean.data.copy_(kept.mean)
        running.var.data.copy_(kept.var)
    return _normalise_shifted(x, weight, bias, running, eps, batch_mean.float() * invstd.float())


def _normalise_shifted(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, eps: float, ratios: Tensor
) -> Normalised:
    """Do what `by_batch` does for values that are, or seem to be, far from 0 or not finite; `ratios`: mean / std, C."""
    shift = None
    if _FAR <= float(ratios.dot(ratios)) < math.inf:
        shift = x.detach().mean([d for d in range(x.ndim) if d != 1])  # C
    # The kernel updates copies: autograd keeps what the kernel gets, and refuses a later change in place.
    copies = None if running is None else running._replace(mean=running.mean.clone(), var=running.var.clone())
    if copies is not None and shift is not None:
        copies.mean.sub_(shift)
    normalised = _native(shifted(x, shift), weight, bias, copies, eps)._replace(shift=shift)
    if running is None or copies is None:
        return normalised
    if not bool(_finite(copies)):
        return normalised._replace(updated=False)
    running.mean.copy_(copies.mean if shift is None else copies.mean + shift)
    running.var.copy_(copies.var)
    return normalised


def _normalise_without_sync(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, eps: float
) -> Normalised:
    """Do what `by_batch` does without reading a value, so that the host does not wait for the device."""
    if running is None:
        return _native(x, weight, bias, None, eps)
    copies = running._replace(mean=running.mean.clone(), var=running.var.clone())
    normalised = _native(x, weight, bias, copies, eps)
    return normalised._replace(updated=_store_if_finite(running, copies))


def shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    """Return x - shift, N x C x ..., from which a batch was normalised."""
    return x if shift is None else x - _per_channel(shift, x)


def by_statistics(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalise by given statistics, a linear function of each channel (paper, Alg. 2, step 11)."""
    if x.dtype != torch.float64 and _can_read_values(x):
        ratios = mean.float() * (var.float() + eps).rsqrt()
        if _FAR <= float(ratios.dot(ratios)) < math.inf:
            shift = mean.to(x.dtype)  # C
            if shift.isfinite().all():
                x, mean = x - _per_channel(shift, x), mean - shift.to(mean.dtype)
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, torch.backends.cudnn.enabled)


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
    finite = _finite(new)
    running.mean.copy_(torch.where(finite, new.mean, running.mean))
    running.var.copy_(torch.where(finite, new.var, running.var))
    return finite


def _native(x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, eps: float) -> Normalised:
    mean, var, momentum = running or _NOTHING
    # torch.batch_norm calls this, which chooses cuDNN where there is one; unlike it, this returns the statistics too.
    y, batch_mean, invstd, _, _ = torch._batch_norm_impl_index(
        x, weight, bias, mean, var, True, momentum, eps, torch.backends.cudnn.enabled
    )
    return Normalised(y, None, batch_mean, invstd, updated=running is not None)


def _can_read_values(x: Tensor) -> bool:
    """Whether reading values of x is possible and free: a GPU makes the host wait, a trace or a vmap has no values."""
    return (
        x.is_cpu
        and type(x) in (Tensor, nn.Parameter)
        and not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch._C._is_tracing())
    )


def _finite(running: Running) -> Tensor:
    return running.mean.isfinite().all() & running.var.isfinite().all()


def _per_channel(channels: Tensor, x: Tensor) -> Tensor:
    """C values as a view that broadcasts over x's channels."""
    return channels.view(-1, *[1] * (x.ndim - 2))
