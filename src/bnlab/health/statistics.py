"""Statistical tests of channels: many at once, so that chance alone reports few."""

import math

import numpy as np
from numpy.typing import NDArray

from bnlab.health.evidence import Floats, LayerEvidence, Sample, distances, is_off
from bnlab.streams import Use, random_stream

RECTIFIERS = ("relu", "relu6")  # what passes nothing below 0
FALSE_DISCOVERIES = 0.01  # q of Benjamini & Hochberg 1995: of the channels that are called significant
OFF_SHARE = 0.5  # of a layer's channels, where no test tells chance apart or the cost is not known
OFF_SHARE_OF_COST = 0.1  # where both do


def significant(
    difference: Floats, error: Floats, q: float = FALSE_DISCOVERIES, degrees: float = math.inf
) -> NDArray[np.bool_]:
    """Which differences their standard errors do not explain, where these have so many degrees of freedom (Student's
    t; infinitely many: the normal distribution); false where either is NaN.
    """
    from scipy.stats import t

    with np.errstate(all="ignore"):
        size = np.abs(difference) / error
    p = 2 * t.sf(size, degrees)
    return benjamini_hochberg(np.where(np.isnan(p), 1.0, p), q)


def benjamini_hochberg(p: Floats, q: float = FALSE_DISCOVERIES) -> NDArray[np.bool_]:
    """Which p-values are significant, a share of q of these at most by chance (Benjamini & Hochberg 1995)."""
    order = np.argsort(p)
    passes = p[order] <= q * np.arange(1, len(p) + 1) / len(p)
    last = int(np.flatnonzero(passes).max(initial=-1))
    found = np.zeros(len(p), bool)
    found[order[: last + 1]] = True
    return found


def shifts(mean: Floats, variance: Floats, from_mean: Floats, from_variance: Floats) -> Floats:
    """The Wasserstein-2 distance of each channel's normal distribution from another, in the other's standard
    deviations. These are taken to be at least 1% of the layer's median, lest channels that are constant outweigh all.
    """
    size = np.sqrt(from_variance.clip(min=0) + 1e-4 * np.median(from_variance) + 1e-12)
    spread = np.sqrt(variance.clip(min=0)) - np.sqrt(from_variance.clip(min=0))
    return np.asarray(np.hypot(mean - from_mean, spread) / size)


def shift_of(layer: LayerEvidence, sample: Sample | None = None) -> float | None:
    """The mean over channels of the distance of inputs (default: those in evaluation) from the running statistics."""
    sample = layer.evaluation if sample is None else sample
    if sample is None or not layer.usable or layer.running_mean is None or layer.running_variance is None:
        return None
    return float(shifts(sample.mean, sample.variance, layer.running_mean, layer.running_variance).mean())


def resampled(sample: Sample, seed: int, draws: int = 400) -> tuple[Floats, Floats]:
    """How far the means and standard deviations of so many images are from their own by chance, draws x C each, by a
    bootstrap over the parts of the batches; widened for few parts as Student's distribution is.
    """
    from scipy.stats import norm, t

    assert sample.groups is not None
    parts = len(sample.groups)
    weights = random_stream(seed, Use.BOOTSTRAP).multinomial(parts, np.full(parts, 1 / parts), draws) / parts
    mean, variance = sample.groups[:, 0], sample.groups[:, 1]  # parts x C
    centre = mean.mean(0)
    means = weights @ (mean - centre)  # draws x C
    squares = weights @ (variance + (mean - centre) ** 2)
    spread = np.sqrt(variance.mean(0) + mean.var(0))
    wider = float(t.ppf(0.995, parts - 1) / norm.ppf(0.995)) * np.sqrt(parts / (parts - 1))
    return means * wider, (np.sqrt((squares - means**2).clip(min=0)) - spread) * wider


def weight_of_initial(layer: LayerEvidence) -> float | None:
    """How much the running statistics weigh the initial mean 0 and variance 1, by least squares against the measured
    population statistics, with the error's scale taken from these; None if it is not known. (The number of batches and
    the momentum do not tell: statistics may have been recalibrated.)
    """
    if layer.batch is None or layer.running_mean is None or layer.running_variance is None:
        return None
    mean, variance = layer.batch.mean, layer.batch.variance
    std, usable = np.sqrt(variance + layer.eps), variance > 0
    if not usable.any():
        return None
    target = np.concatenate([-mean / std, (1 - variance) / (variance + layer.eps)])[np.tile(usable, 2)]
    found = np.concatenate(
        [(layer.running_mean - mean) / std, (layer.running_variance - variance) / (variance + layer.eps)]
    )
    found = found[np.tile(usable, 2)]
    size = float(target @ target)
    return float(np.clip(found @ target / size, 0, 1)) if size > 0 and np.isfinite(found).all() else None


def off_share(layer: LayerEvidence) -> float | None:
    """The fraction of channels whose running statistics are off by more than chance explains (see BN102); None: not
    measured.
    """
    if layer.batch is None or layer.running_mean is None or layer.running_variance is None or layer.frozen:
        return layer.off_share
    sample = layer.batch
    off = is_off(*distances(layer.running_mean, layer.running_variance, sample.mean, sample.variance, layer.eps))
    mean_error, variance_error = _errors(layer, sample)
    degrees = max(1, min(sample.batches, 32) - 1)
    by_mean = significant(layer.running_mean - sample.mean, mean_error, degrees=degrees)
    by_variance = significant(layer.running_variance - sample.variance, variance_error, degrees=degrees)
    return float((off & (by_mean | by_variance | ~np.isfinite(layer.running_mean + layer.running_variance))).mean())


def _errors(layer: LayerEvidence, sample: Sample) -> tuple[Floats, Floats]:
    """Standard errors of the difference between running statistics that are right and those measured, C each.

    Running statistics are a moving average with momentum m, or an average of n batches if these have been recalibrated
    and n is small: the more uncertain of the two is assumed.
    """
    momentum = 0.0 if layer.momentum is None else min(layer.momentum, 1.0)
    share = max(momentum / (2 - momentum), 1 / layer.updates if layer.updates else 0.0) + 1 / sample.batches
    groups = None if sample.groups is None else sample.groups[:, 1]  # variances of G parts of the batches, G x C
    if groups is None or len(groups) < 2:
        of_variance = np.full_like(sample.variance, np.inf)
    else:
        of_variance = groups.var(0, ddof=1) * sample.batches / len(groups)  # of one batch
    return np.sqrt(sample.between * share), np.sqrt(of_variance * share)


DEAD = -3.0902  # Phi(DEAD) = 1 in 1,000


def dead_by_parameters(layer: LayerEvidence) -> NDArray[np.bool_]:
    """The channels of which a ReLU that follows directly passes fewer than 1 in 1,000 values if these are normally
    distributed: Phi(beta / |gamma|) < 0.001; C.
    """
    if layer.gamma is None or layer.activation not in RECTIFIERS:
        return np.zeros(layer.channels, bool)
    beta = np.zeros_like(layer.gamma) if layer.beta is None else layer.beta
    return beta <= DEAD * np.abs(layer.gamma)


def effective_batch(sample: Sample, eps: float) -> tuple[float, float] | None:
    """N_eff = variance / variance between batches, pooled over channels, and the upper end of its 95% interval.

    Channels whose variance is below eps, which they are normalised by, are left out; None if none remains, or if there
    is one batch. The variance between K batches has the distribution of chi-square with (K - 1) times as many degrees
    of freedom as there are independent channels (Satterthwaite 1946), of which there are fewer than channels.
    """
    from scipy.stats import chi2

    live = (sample.variance > eps) & np.isfinite(sample.between)
    if sample.batches < 2 or not live.any():
        return None
    ratio = float((sample.between[live] / sample.variance[live]).mean())
    if ratio <= 0:
        return math.inf, math.inf
    means = None if sample.groups is None else sample.groups[:, 0, live]  # G x C
    channels = 1.0 if means is None else _independent_channels(means / np.sqrt(sample.variance[live]))
    degrees = (sample.batches - 1) * channels
    return 1 / ratio, float(chi2.ppf(0.975, degrees)) / degrees / ratio


def _independent_channels(values: Floats) -> float:
    """How many independent channels are worth C correlated ones: (tr S)^2 / tr(S^2) of their covariance S, by G x C
    values; tr(S^2) is estimated without bias (Bai & Saranadasa 1996). Of two values or fewer: 1.
    """
    n, channels = len(values) - 1, values.shape[1]
    if n < 2:
        return 1.0
    centred = values - values.mean(0)
    gram = centred @ centred.T / n  # G x G: its eigenvalues are those of S
    trace, squares = float(np.trace(gram)), float((gram**2).sum())
    unbiased = n**2 / ((n - 1) * (n + 2)) * (squares - trace**2 / n)
    return float(np.clip(trace**2 / unbiased, 1, channels)) if unbiased > 0 else float(channels)
