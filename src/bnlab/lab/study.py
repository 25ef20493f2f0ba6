"""What a study is: a claim with its source, a protocol, a measurement and a rule that gives the verdict."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

from bnlab.lab.experiment import Experiment
from bnlab.lab.records import Results
from bnlab.lab.verdict import Evidence, Verdict, together
from bnlab.report.plots import Plot


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the tables of a study say."""

    evidence: tuple[Evidence, ...]
    """the clauses of the claim, each with its numbers"""
    plots: Mapping[str, Plot]
    """by the name of their file"""
    intervals: Callable[[Sequence[Evidence]], Mapping[str, Plot]] = lambda evidence: {}
    """plots of the evidence's own intervals, which become `plots` too: drawn anew where intervals widen"""
    numbers: Mapping[str, float | None] = field(default_factory=dict)
    """what else is worth knowing, by name with unit"""
    remarks: tuple[str, ...] = ()
    """sentences on what was seen, such as trainings that diverged"""

    def __post_init__(self) -> None:
        """Draw the intervals."""
        object.__setattr__(self, "plots", {**self.plots, **self.intervals(self.evidence)})

    @property
    def verdict(self) -> Verdict:
        """Of the whole claim."""
        return together(self.evidence)

    def overlapping(self, overlap: float) -> "Findings":
        """The same, where seeds split the same photos anew, so many of test to each of train."""
        return replace(self, evidence=tuple(replace(each, overlap=overlap) for each in self.evidence))

    def to_json(self) -> dict[str, Any]:
        """The document's "numbers"; what is not finite is None."""
        beside = {key: value if value is None or isfinite(value) else None for key, value in self.numbers.items()}
        return {each.what: each.to_json() for each in self.evidence} | beside


@dataclass(frozen=True, kw_only=True)
class Study:
    """A claim, and how it is measured and judged. `measure` fills tables; all else is read off them."""

    name: str
    title: str
    claim: str
    """what the source says, in one sentence"""
    source: str
    """where it says so"""
    protocol: str
    """what is trained on what, and what is held equal"""
    rule: str
    """when the claim holds, and when it does not"""
    measure: Callable[[Experiment], Results]
    judge: Callable[[Results], Findings]
    least: int = 100
    """photos that DATA has to have"""
    owns: tuple[str, ...] = ()
    """keys that a user may set else, which this study sets itself"""

    def __post_init__(self) -> None:
        """Texts may be broken into lines where they are written."""
        for key in ("claim", "source", "protocol", "rule"):
            object.__setattr__(self, key, " ".join(getattr(self, key).split()))
