"""A study: a claim with its source, a protocol, a measurement, and a rule that gives the verdict; and all studies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from math import isfinite
from typing import Any

from bnlab.errors import UsageError, did_you_mean, printable
from bnlab.lab.experiment import Experiment
from bnlab.lab.records import Results
from bnlab.lab.verdict import Evidence, Verdict, combined_verdict
from bnlab.report.plots import Plot

# In the order of the paper's sections, then the later papers that answer it. Each is lab/studies/NAME.py, or a folder
# of that name with its helpers.
STUDY_NAMES = (
    "activations",
    "learning-rate",
    "seven-changes",
    "scale-invariance",
    "bias",
    "placement",
    "regularisation",
    "batch-size",
    "inference-statistics",
    "initialisation",
    "covariate-shift",
    "smoothness",
    "whitening",
    "ensemble",
)


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """What follows from the tables of a study."""

    evidence: tuple[Evidence, ...]
    plots: Mapping[str, Plot]  # By the name of their file.
    intervals: Callable[[Sequence[Evidence]], Mapping[str, Plot]] = lambda evidence: {}
    """Makes plots of the evidence's intervals. They join `plots`, and are made anew when the intervals widen."""
    numbers: Mapping[str, float | None] = field(default_factory=dict)
    """Further numbers, by a name that includes the unit."""
    remarks: tuple[str, ...] = ()  # Sentences on what the reader has to know, such as how many trainings diverged.

    def __post_init__(self) -> None:
        object.__setattr__(self, "plots", {**self.plots, **self.intervals(self.evidence)})

    @property
    def verdict(self) -> Verdict:
        return combined_verdict(self.evidence)

    def with_overlap(self, overlap: float) -> "Conclusion":
        """The same conclusion with intervals for seeds that split the same photos anew: see `Evidence.overlap`."""
        return replace(self, evidence=tuple(replace(each, overlap=overlap) for each in self.evidence))

    def to_json(self) -> dict[str, Any]:
        """The document's "numbers"; what is not finite is None."""
        further = {key: value if value is None or isfinite(value) else None for key, value in self.numbers.items()}
        return {each.what: each.to_json() for each in self.evidence} | further


@dataclass(frozen=True, kw_only=True)
class Study:
    """A claim and how it is tested. `measure` fills tables of results; `conclude` reads everything else from them."""

    name: str
    title: str
    claim: str
    source: str
    protocol: str  # What is trained on what, and what is held equal.
    rule: str
    measure: Callable[[Experiment], Results]
    conclude: Callable[[Results], Conclusion]
    min_photos: int = 100
    own_keys: tuple[str, ...] = ()
    """Recipe keys that this study sets itself, although a user may set them for other studies."""

    def __post_init__(self) -> None:
        for key in ("claim", "source", "protocol", "rule"):  # their line breaks in the source code mean nothing
            object.__setattr__(self, key, " ".join(getattr(self, key).split()))


def find_study(name: str) -> Study:
    """The study of that name.

    Raises:
        UsageError: no study has that name.
    """
    if name not in STUDY_NAMES:
        raise UsageError(f"no study is called '{printable(name)}'", did_you_mean(name, list(STUDY_NAMES)))
    study: Study = import_module(f"bnlab.lab.studies.{name.replace('-', '_')}").STUDY
    return study
