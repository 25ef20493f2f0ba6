"""Statistical tests of channels: many at once, so that chance alone reports few."""

import numpy as np
from numpy.typing import NDArray

from bnlab.health.evidence import Floats, LayerEvidence, Sample

FALSE_DISCOVERIES = 0.01  # q of Benjamini & Hochberg 1995: of the channels that are called significant


def significant(difference: Floats, error: Floats) -> NDArray[np.bool_]:
    """Which differences their standard errors do not explain, by the normal distribution; false where either is NaN."""
    from scipy.stats import norm

    with np.errstate(all="ignore"):
        z = np.abs(difference) / error
    p = 2 * norm.sf(z)
    return benjamini_hochberg(np.where(np.isnan(p), 1.0, p))


def benjamini_hochberg(p: Floats, q: float = FALSE_DISCOVERIES) -> NDArray[np.bool_]:
    """Which p-values are significant, where a share of at most q of these is so by chance (Benjamini & Hochberg 1995)."""
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
    weights = np.random.default_rng(seed).multinomial(parts, np.full(parts, 1 / parts), draws) / parts
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
