"""What numbers say of a claim: an interval over seeds, held against the range that the claim gives.

The rule is the same for every study. A claim says that a number, such as the difference of two accuracies, lies in a
range. Each seed gives one value; their mean has a 95% interval (Student's t). The claim holds if the whole interval
lies in the range, does not hold if the whole interval lies outside, and is not shown otherwise.

Seeds that split the same photos anew are not independent: their trains overlap. Taken for independent they would give
intervals too narrow, and more of them would show anything. So the variance of the mean is s2 (1 / n + test / train)
for test and train photos, not s2 / n (Nadeau & Bengio 2003, Inference for the Generalization Error).

A claim with k clauses holds if each does. One clause refutes it; as any of the k may do so by chance, it has to with
an interval of 1 - 0.05 / k (Bonferroni).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """What became of a claim."""

    HOLDS = "holds"
    DOES_NOT_HOLD = "does not hold"
    NOT_SHOWN = "not shown"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One number that a claim is about, measured over seeds."""

    what: str
    """a clause that the claim makes true or false: "with BN the accuracy is higher" """
    values: tuple[float, ...]
    """one for each seed; for `ratio` above 0"""
    above: float = -math.inf
    """the claim: the mean is larger than this"""
    below: float = math.inf
    """and smaller than this"""
    unit: str = ""
    """such as "points", or "times" """
    ratio: bool = False
    """averaged as logarithms, so that half and twice are as far from 1"""
    resolution: float = 0.0
    """the least step of the measure, such as one photo; the interval is no finer"""
    level: float = 0.95
    """of the interval"""
    primary: bool = True
    """whether the verdict of the study follows from it"""
    overlap: float = 0.0
    """test photos to each of train, where seeds split the same photos anew"""

    @property
    def mean(self) -> float:
        """Over the seeds; of ratios the geometric mean. NaN where a seed has no number."""
        return self._back(sum(self._scaled) / len(self.values)) if self.values else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Of the mean. One seed gives none: the interval is all there is."""
        n, scaled = len(self.values), self._scaled
        if n < 2 or not all(map(math.isfinite, scaled)):
            return (0.0, math.inf) if self.ratio else (-math.inf, math.inf)
        from scipy.stats import t

        mean = sum(scaled) / n
        deviation = math.sqrt(sum((value - mean) ** 2 for value in scaled) / (n - 1))
        error = deviation * math.sqrt(1 / n + self.overlap)
        half = max(float(t.ppf(0.5 + self.level / 2, n - 1)) * error, self.resolution)
        return self._back(mean - half), self._back(mean + half)

    @property
    def verdict(self) -> Verdict:
        """By the rule at the top of this file."""
        low, high = self.interval
        if self.above < low and high < self.below:
            return Verdict.HOLDS
        if high <= self.above or self.below <= low:
            return Verdict.DOES_NOT_HOLD
        return Verdict.NOT_SHOWN

    @property
    def claimed(self) -> str:
        """The range in words, such as "> 0"."""
        low, high = f"{self.above:g}", f"{self.below:g}"
        if math.isinf(self.below):
            return f"> {low}"
        return f"< {high}" if math.isinf(self.above) else f"{low} to {high}"

    def to_json(self) -> dict[str, Any]:
        """Numbers that JSON can hold: what is not finite is None."""
        low, high = self.interval
        numbers = {"mean": self.mean, "low": low, "high": high}
        return {
            **{key: value if math.isfinite(value) else None for key, value in numbers.items()},
            "unit": self.unit,
            "claimed": self.claimed,
            "values": [value if math.isfinite(value) else None for value in self.values],
            "n": len(self.values),
            "level": self.level,
            "decides": self.primary,
            "verdict": str(self.verdict),
        }

    @property
    def _scaled(self) -> Sequence[float]:
        return [_log(value) for value in self.values] if self.ratio else self.values

    def _back(self, value: float) -> float:
        if not self.ratio:
            return value
        return math.exp(value) if value < 700 or math.isnan(value) else math.inf


def combined_verdict(evidence: Sequence[Evidence]) -> Verdict:
    """Of a claim with several clauses, by the rule at the top of this file."""
    clauses = [each for each in evidence if each.primary]
    assert clauses, "a study has to decide by something"
    strict = [replace(each, level=1 - (1 - each.level) / len(clauses)).verdict for each in clauses]
    if Verdict.DOES_NOT_HOLD in strict:
        return Verdict.DOES_NOT_HOLD
    return Verdict.HOLDS if all(each.verdict == Verdict.HOLDS for each in clauses) else Verdict.NOT_SHOWN


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf if value == 0 else math.nan
