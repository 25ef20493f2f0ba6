"""Which verdict on a claim follows from numbers: an interval over seeds is compared with the range that is claimed.

The rule is the same for every study. A claim says that a number, such as the difference of two accuracies, lies in a
range. Each seed gives one value, and their mean has a 95% interval (Student's t). The claim holds if the complete
interval lies in the range, does not hold if the complete interval lies outside, and is not shown otherwise.

Seeds that split the same photos anew are not independent, since their train splits overlap. An interval that took them
for independent would be too narrow, and more seeds would show anything. So the variance of the mean is taken as
s^2 (1 / n + test / train), for so many test and train photos, in place of s^2 / n (Nadeau & Bengio 2003, Inference for
the Generalization Error).

A claim with k clauses holds if each clause holds. One clause is enough to refute it. As any of the k clauses may do so
by chance, the clause has to do it with an interval of level 1 - 0.05 / k (Bonferroni).
"""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    HOLDS = "holds"
    DOES_NOT_HOLD = "does not hold"
    NOT_SHOWN = "not shown"


@dataclass(frozen=True)
class Evidence:
    """A clause of a claim, and the number that it is about, measured over seeds."""

    what: str  # The clause, which is true or false, such as "with BN the accuracy is higher".
    values: Sequence[float]  # One for each seed. NaN if a seed has no number.
    _: KW_ONLY
    above: float = -math.inf
    below: float = math.inf  # The clause says that the mean is larger than `above` and smaller than `below`.
    unit: str = ""  # Such as "points" or "times".
    ratio: bool = False
    """Whether the values are ratios above 0. Their logarithms are averaged, so that 1/2 and 2 are as far from 1."""
    resolution: float = 0.0
    """The smallest step of the measure, such as one photo. The interval reaches at least so far on either side."""
    level: float = 0.95  # A primary clause keeps this one: `combined_verdict` alone allows for the number of clauses.
    primary: bool = True  # Whether the verdict of the study follows from this clause.
    overlap: float = 0.0  # Test photos per train photo if the seeds split the same photos anew, otherwise 0.

    @property
    def mean(self) -> float:
        """The mean over seeds, of ratios the geometric one. NaN if a seed has no number."""
        return self._unscaled(sum(self._scaled) / len(self.values)) if self.values else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The interval of the mean. It is unbounded if there is only one seed, or if a value is not finite."""
        n, scaled = len(self.values), self._scaled
        if n < 2 or not all(map(math.isfinite, scaled)):
            return (0.0, math.inf) if self.ratio else (-math.inf, math.inf)
        from scipy.stats import t

        mean = sum(scaled) / n
        deviation = math.sqrt(sum((value - mean) ** 2 for value in scaled) / (n - 1))
        error = deviation * math.sqrt(1 / n + self.overlap)
        half = max(float(t.ppf(0.5 + self.level / 2, n - 1)) * error, self.resolution)
        return self._unscaled(mean - half), self._unscaled(mean + half)

    @property
    def verdict(self) -> Verdict:
        """The verdict on this clause, by the rule at the top of this file."""
        low, high = self.interval
        if self.above < low and high < self.below:
            return Verdict.HOLDS
        if high <= self.above or self.below <= low:
            return Verdict.DOES_NOT_HOLD
        return Verdict.NOT_SHOWN

    @property
    def claimed(self) -> str:
        """The claimed range in words, such as "> 0"."""
        low, high = f"{self.above:g}", f"{self.below:g}"
        if math.isinf(self.below):
            return f"> {low}"
        return f"< {high}" if math.isinf(self.above) else f"{low} to {high}"

    def to_json(self) -> dict[str, Any]:
        """The clause for the JSON document. A number that is not finite is None, since JSON cannot hold it."""
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

    def _unscaled(self, value: float) -> float:
        if not self.ratio:
            return value
        return math.exp(value) if value < 700 or math.isnan(value) else math.inf


def combined_verdict(evidence: Sequence[Evidence]) -> Verdict:
    """The verdict on a claim with several clauses, by the rule at the top of this file. Only primary clauses count."""
    clauses = [each for each in evidence if each.primary]
    assert clauses, "a study needs a primary clause"
    assert all(each.level == Evidence.level for each in clauses), "the level of a primary clause is corrected twice"
    strict = [replace(each, level=1 - (1 - each.level) / len(clauses)).verdict for each in clauses]
    if Verdict.DOES_NOT_HOLD in strict:
        return Verdict.DOES_NOT_HOLD
    return Verdict.HOLDS if all(each.verdict == Verdict.HOLDS for each in clauses) else Verdict.NOT_SHOWN


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf if value == 0 else math.nan
