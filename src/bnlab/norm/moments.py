"""Moments that merge without loss: count, mean and scatter (the sum of squared distances from the mean).

Averaging the variances of batches, as is often done, ignores that their means differ. Merging moments (Chan, Golub &
LeVeque 1979) does not: however the values are batched, the result is that of all of them at once.

Shapes: C channels. Everything is float64.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 4096  # values of a channel that are summed in float32 at a time, since torch's kernel adds them one by one
_FAR = 100.0  # |mean| / std from which float32 sums are not to be trusted


@dataclass(frozen=True)
class Moments:
    """The number of each channel's values, their mean (C), and the sum of their squared distances from it (C).

    For whitening, `scatter` is the sum of outer products, groups x D x D for C = groups * D channels.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    def variance(self, *, unbiased: bool) -> Tensor:
        """Scatter / count or, unbiased, scatter / (count - 1); NaN where the divisor is not positive."""
        return self.scatter / (self.count - unbiased) if self.count > unbiased else self.scatter * torch.nan

    def cpu(self) -> "Moments":
        return Moments(self.count, self.mean.cpu(), self.scatter.cpu())


@torch.no_grad()
def measure(x: Tensor) -> Moments:
    """Return the moments of a batch, N x C x ...; an empty one has count 0, and merging it changes nothing.

    torch's kernel sums float32 values in channels-last order one by one in float32. It therefore gets few at a time,
    whose moments are merged. Where a mean lies far from 0 this does not suffice, and the values are taken in float64.
    """
    channels = x.shape[1]
    if not x.numel():
        zero = torch.zeros(channels, dtype=torch.float64, device=x.device)
        return Moments(0, zero, zero)
    if x.dtype == torch.float64:
        return _measure_exactly(x)
    x, count = x.float(), x.numel() // channels
    if x.is_cuda:  # there the kernel is Welford's
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)  # C, C
        return Moments(count, mean.double(), var.double() * count)
    x = x.cpu()  # other devices may lack float64
    rows = x.movedim(1, -1)  # N x ... x C
    if rows.is_contiguous():
        x = rows.flatten(0, -2)  # count x C: can be cut within an example too
    size = max(1, _CHUNK * len(x) // count)
    if size >= len(x):
        mean, var = (part.double() for part in torch.batch_norm_update_stats(x, None, None, 0.0))  # C, C
        return Moments(count, mean, var * count) if _precise(mean, var) else _measure_exactly(x)
    chunks = torch.split(x, size)
    means, variances = zip(*(torch.batch_norm_update_stats(c, None, None, 0.0) for c in chunks), strict=True)
    mean, var = torch.stack(means).double(), torch.stack(variances).double()  # chunks x C
    if not _precise(mean, var):
        return _measure_exactly(x)
    counts = torch.tensor([c.numel() // channels for c in chunks], dtype=torch.float64)
    return _merge(counts, mean, var * counts[:, None])


def _precise(mean: Tensor, var: Tensor) -> bool:
    return bool((mean * mean <= _FAR**2 * var).all())


def measure_covariance(x: Tensor, groups: int) -> Moments:
    """Return the moments as `measure` does, but with the co-scatter of the channels of each group, groups x D x D."""
    values = x.detach().double().transpose(0, 1).reshape(groups, x.shape[1] // groups, -1)  # groups x D x count
    if not x.numel():
        zero = values.new_zeros(groups, values.shape[1], values.shape[1])
        return Moments(0, zero[..., 0].flatten(), zero)
    mean = values.mean(2, keepdim=True)  # groups x D x 1
    centred = values - mean
    return Moments(values.shape[2], mean.flatten(), centred @ centred.mT)


def merge(parts: Iterable[Moments]) -> Moments:
    """Return the moments of the values of all parts together; there must be at least one part."""
    parts = list(parts)
    counts = torch.tensor([part.count for part in parts], dtype=torch.float64, device=parts[0].mean.device)
    return _merge(counts, torch.stack([p.mean for p in parts]), torch.stack([p.scatter for p in parts]))


def _measure_exactly(x: Tensor) -> Moments:
    var, mean = torch.var_mean(x.double(), [d for d in range(x.ndim) if d != 1], correction=0)  # C, C
    count = x.numel() // x.shape[1]
    return Moments(count, mean, var * count)


def _merge(counts: Tensor, means: Tensor, scatters: Tensor) -> Moments:
    """Merge P parts: counts P, means P x C, scatters P x C or P x groups x D x D."""
    total = counts.sum()
    weights = counts / total.clamp(min=1)  # P
    mean = torch.einsum("p,pc->c", weights, means)  # C
    apart = means - mean  # P x C
    if scatters.ndim == 2:
        scatter = scatters.sum(0) + torch.einsum("p,pc,pc->c", counts, apart, apart)  # C
    else:
        apart = apart.view(scatters.shape[:3])  # P x groups x D
        scatter = scatters.sum(0) + torch.einsum("p,pgi,pgj->gij", counts, apart, apart)  # groups x D x D
    return Moments(int(total), mean, scatter)


def merge_statistics(means: Tensor, variances: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of P populations together, float64; the variance has that of the means in it.

    Args:
        means: P x C.
        variances: P x C, or covariances, P x groups x D x D.
        weights: P, what each population counts; they need not sum to 1.
    """
    weights = weights.double() / weights.double().sum()
    parts = variances.double() * weights.view(-1, *[1] * (variances.ndim - 1))
    merged = _merge(weights, means.double(), parts)
    return merged.mean, merged.scatter
