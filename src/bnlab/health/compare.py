"""Compares two ways to run a network by its scores on the same images, paired by image.

Accuracy: the exact McNemar test, which is the binomial test of the images that just one way classifies correctly, and
the 95% interval of the difference by Newcombe 1998, "Improved confidence intervals for the difference between binomial
proportions based on paired data", method 10. Other metrics: the paired t-test and its interval.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Kind = Literal["accuracy", "metric", "metric of batches"]
"""of scores. accuracy: whether an image's class is correct, or the share of its positions that are; metric: the
caller's, of each image; metric of batches: the caller's, of each batch"""

LOST = 0.01  # of the accuracy, or of the size of another metric: a smaller difference does not matter
P_VALUE = 0.01
_Z = 1.959964  # 95% of a normal distribution


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Mean scores before and after a change, on the same n images (or batches); an accuracy is in 0..1."""

    n: int
    before: float
    after: float
    interval: tuple[float, float]
    """95% interval of after - before"""
    p_value: float
    """the probability of a difference at least as large if neither way were better, two-sided"""
    kind: Kind = "accuracy"

    @classmethod
    def measure(cls, before: ArrayLike, after: ArrayLike, kind: Kind = "accuracy") -> Self:
        """Compare the scores of each image (or batch), n each.

        Raises:
            ValueError: there are no scores, or not equally many.
        """
        first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
        if first.shape != second.shape or first.ndim != 1 or not len(first):
            raise ValueError(f"scores of the same images are compared, not of {first.shape} and {second.shape}")
        binary = kind == "accuracy" and bool(np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all())
        interval, p_value = (_mcnemar if binary else _t_test)(first, second)
        return cls(
            n=len(first),
            before=float(first.mean()),
            after=float(second.mean()),
            interval=interval,
            p_value=p_value,
            kind=kind,
        )

    @property
    def is_accuracy(self) -> bool:
        return self.kind == "accuracy"

    @property
    def gain(self) -> float:
        return self.after - self.before

    @property
    def matters(self) -> bool:
        """Whether the gain is positive, significant and large enough to report: 1 point, or 1% of another metric."""
        scale = 1.0 if self.is_accuracy else max(abs(self.before), abs(self.after))
        return self.gain >= LOST * scale and self.p_value < P_VALUE

    def reversed(self) -> "Comparison":
        low, high = self.interval
        return Comparison(
            n=self.n,
            before=self.after,
            after=self.before,
            interval=(-high, -low),
            p_value=self.p_value,
            kind=self.kind,
        )

    def __str__(self) -> str:
        """For example "81.2% instead of 93.4% on 1,024 images (12.2 points, 95% interval 10.1 to 14.3, p = 3e-31)"."""
        return f"{self.text(self.before)} instead of {self.text(self.after)} {self.evidence()}"

    def text(self, score: float) -> str:
        """For example "81.2%"."""
        return f"{score:.1%}" if self.is_accuracy else f"{score:.4g}"

    def evidence(self, sign: Literal["", "+"] = "") -> str:
        """For example "on 1,024 images (12.2 points, 95% interval 10.1 to 14.3, p = 3e-31)"."""
        scale, form, unit = (100, ".1f", " points") if self.is_accuracy else (1, ".3g", "")
        gain, low, high = (f"{scale * x:{sign}{form}}" for x in (self.gain, *self.interval))
        p = f"p = {self.p_value:.1g}" if self.p_value else "p < 1e-300"
        of = "batches" if self.kind == "metric of batches" else "images"
        return f"on {self.n:,} {of} ({gain}{unit}, 95% interval {low} to {high}, {p})"

    def to_json(self) -> Mapping[str, Any]:
        return {
            "n": self.n,
            "before": self.before,
            "after": self.after,
            "interval": [*self.interval],
            "p": self.p_value,
        }


def _mcnemar(before: Floats, after: Floats) -> tuple[tuple[float, float], float]:
    from scipy.stats import binomtest

    gained, lost = int((after > before).sum()), int((after < before).sum())
    p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    n, both = len(before), int((before * after).sum())
    neither = n - both - gained - lost
    first, second = before.mean(), after.mean()
    (low1, high1), (low2, high2) = _wilson(first, n), _wilson(second, n)
    # the correlation of the two results (Newcombe's phi), without a continuity correction
    margins = (both + lost) * (both + gained) * (neither + gained) * (neither + lost)
    phi = (both * neither - gained * lost) / math.sqrt(margins) if margins else 0.0
    difference = second - first
    down = (second - low2) ** 2 - 2 * phi * (second - low2) * (high1 - first) + (high1 - first) ** 2
    up = (high2 - second) ** 2 - 2 * phi * (high2 - second) * (first - low1) + (first - low1) ** 2
    return (float(difference - math.sqrt(max(down, 0))), float(difference + math.sqrt(max(up, 0)))), p_value


def _wilson(share: float, n: int) -> tuple[float, float]:
    centre, spread = share + _Z**2 / (2 * n), _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n))
    return (centre - spread) / (1 + _Z**2 / n), (centre + spread) / (1 + _Z**2 / n)


def _t_test(before: Floats, after: Floats) -> tuple[tuple[float, float], float]:
    from scipy.stats import t

    differences = after - before
    n, mean = len(differences), float(differences.mean())
    if n < 2 or not np.isfinite(mean):
        return (-math.inf, math.inf), 1.0
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    if error == 0:
        return (mean, mean), 0.0 if mean else 1.0
    half = float(t.ppf(0.975, n - 1)) * error
    return (mean - half, mean + half), float(2 * t.sf(abs(mean) / error, n - 1))
