"""Measures how many points of the gap between running and batch statistics each cause that was found explains.

Each cause has a repair: other statistics, changed images, or all modules in evaluation. The repairs are made one at a
time, all together, and all but one, on the same images. What the other passes have measured is not measured again.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from bnlab.errors import plural
from bnlab.health.attribution import Attribution, Explained
from bnlab.health.batches import Batches
from bnlab.health.check import Finding
from bnlab.health.compare import Comparison
from bnlab.health.evidence import Evidence, Floats
from bnlab.health.gather.inputs import Transform, Trials, entrance_of
from bnlab.health.gather.passes import measure_inputs
from bnlab.health.gather.pixels import Change
from bnlab.health.gather.statistics_switch import StatisticsSwitch
from bnlab.health.gather.training_images import AugmentedEvidence
from bnlab.health.restore import restored
from bnlab.health.subject import Subject
from bnlab.norm.recalibrate import evaluation_mode

Source = Literal["augmented", "reference", "own"]
"""images that statistics are measured on: augmented or plain training images, or those of the diagnosis"""
_NEARER: tuple[Source, ...] = (
    "augmented",
    "reference",
    "own",
)  # of two repairs of the statistics, the later one counts


@dataclass(frozen=True, kw_only=True)
class _Cause:
    """A cause and its repair, which is one of the three."""

    name: str
    check: str
    change: Transform | None = None
    source: Source | None = None
    evaluation: bool = False


def attribute(subject: Subject, evidence: Evidence, findings: Sequence[Finding]) -> Attribution | None:
    """What explains the gap, by the causes of the findings; None if there is no gap. The caller restores the model.

    The scores with the gap are those by running statistics; where modules were in training mode while the model was
    in evaluation, they are those that this gives.
    """
    scores = evidence.scores
    if scores is None or scores.batch is None or scores.running is None or evidence.sorted_by_class:
        return None
    causes = _causes(subject, evidence, {finding.id for finding in findings})
    with subject.noting("what explains the gap was not measured"):
        return _attribute(subject, evidence, causes, scores.batch)
    return None


def _attribute(
    subject: Subject, evidence: Evidence, causes: Sequence["_Cause"], by_batch: Floats
) -> Attribution | None:
    ways = _Ways(subject, evidence, causes)
    gap = ways.compare(ways.scores([]), by_batch)
    if not gap.matters:
        return None
    alone = {cause: ways.compare(ways.scores([]), ways.scores([cause])) for cause in causes}
    helping = [cause for cause in causes if alone[cause].matters or _is_missed(ways, causes, cause)]
    together = ways.compare(ways.scores([]), ways.scores(helping)) if helping else None
    explained = []
    for cause in causes:
        rest = [other for other in helping if other is not cause]
        without = ways.compare(ways.scores(helping), ways.scores(rest)) if cause in helping else None
        explained.append(Explained(cause=cause.name, check=cause.check, alone=alone[cause], without=without))
    if ways.passes:
        subject.notes.append(f"to attribute the gap, the images were run {plural(ways.passes, 'more time')}")
    return Attribution(gap=gap, causes=tuple(explained), together=together)


def _is_missed(ways: "_Ways", causes: Sequence[_Cause], cause: _Cause) -> bool:
    """Whether points are lost if all causes but this one are repaired."""
    rest = [other for other in causes if other is not cause]
    return bool(rest) and ways.compare(ways.scores(rest), ways.scores(causes)).matters


def _causes(subject: Subject, evidence: Evidence, found: set[str]) -> list[_Cause]:
    """The causes that the checks found, the most specific first. Of two with the same repair, the first is taken."""
    causes: list[_Cause] = []
    if "BN002" in found and not evidence.root_training and any(subject.modes.values()):
        causes.append(_Cause(name="mode", check="BN002", evaluation=True))
    if "BN112" in found and (best := evidence.part("preprocessing", Trials).best) and best.change is not None:
        causes.append(_Cause(name="preprocessing", check="BN112", change=_changed(best.change)))
    if "BN113" in found and (best := evidence.part("resolution", Trials).best):
        causes.append(_Cause(name="resolution", check="BN113", change=_scaled(best.value)))
    plain: Source = "own" if subject.given.reference is None else "reference"
    lagging: Source = "augmented" if "BN107" in found and subject.given.augmented is not None else plain
    sources: tuple[tuple[str, str, Source], ...] = (
        ("BN111", "domain", "own"),
        ("BN107", "augmentation", plain),
        ("BN108", "dropout", plain),
        ("BN008", "broken statistics", plain),
        ("BN102", "stale statistics", lagging),
        ("BN103", "small batches", plain),
    )
    taken: set[Source] = set()
    for check, name, source in sources:
        if check in found and source not in taken:
            taken.add(source)
            causes.append(_Cause(name=name, check=check, source=source))
    return causes


def _changed(by: Change) -> Transform:
    def change(x: Tensor) -> Tensor:
        return by.apply(x)

    return change


def _scaled(factor: float) -> Transform:
    def change(x: Tensor) -> Tensor:
        size = [round(side * factor) for side in x.shape[2:]]
        return F.interpolate(x, size, mode="bilinear", antialias=True)  # N x C x height x width

    return change


_Way = tuple[tuple[Transform, ...], Source | None, bool]
"""changes of the images, what the statistics are measured on (None: the running ones), and whether all is evaluated"""


@dataclass
class _Ways:
    """Runs the images with some causes repaired, each way once."""

    subject: Subject
    evidence: Evidence
    causes: Sequence[_Cause]
    passes: int = 0
    """over all images, beyond those of the diagnosis"""
    known: dict[_Way, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        scores = self.evidence.scores
        part = self.evidence.parts.get("augmented")
        augmented = part if isinstance(part, AugmentedEvidence) else None
        plain: Source = "own" if self.subject.given.reference is None else "reference"
        measured: dict[Source | None, Floats | None] = {
            "augmented": None if augmented is None else augmented.by_augmented,
            plain: None if augmented is None else augmented.by_plain,
        }
        if scores is not None:
            measured |= {None: scores.running, "own": scores.population}
        self.known = {((), source, True): found for source, found in measured.items() if found is not None}

    def compare(self, before: Floats, after: Floats) -> Comparison:
        return self.subject.batches.compare(before, after)

    def scores(self, repaired: Sequence[_Cause]) -> Floats:
        """The scores of all images with these causes repaired."""
        sources = [cause.source for cause in repaired if cause.source is not None]
        changes = tuple(cause.change for cause in repaired if cause.change is not None)
        mode = next((cause for cause in self.causes if cause.evaluation), None)
        way = changes, max(sources, key=_NEARER.index, default=None), mode is None or mode in repaired
        if way not in self.known:
            self.known[way] = self._run(*way)
        return self.known[way]

    @torch.no_grad()
    def _run(self, changes: Sequence[Transform], source: Source | None, evaluation: bool) -> Floats:
        subject = self.subject
        network, batches = subject.network, subject.batches
        found: list[Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(restored(network))  # layers in training mode move their statistics
            entrance = stack.enter_context(entrance_of(network))
            entrance.change = lambda x: _all(changes, x)
            switch = StatisticsSwitch(subject.layers)
            switch.to("running")
            if source is not None:
                images = self._images(source)
                self.passes += images is batches
                statistics = measure_inputs(network, subject.layers, images, subject.call, "batch")[1]
                switch.to("population", statistics)
            stack.enter_context(evaluation_mode(network))
            if not evaluation:
                for name, module in network.named_modules():
                    module.training = subject.modes[name]
            for batch in batches:
                score = batches.score(subject.call(batch), batch)
                assert score is not None  # there were scores before
                found.append(score)
        self.passes += 1
        return torch.cat(found).numpy()

    def _images(self, source: Source) -> Batches:
        given = self.subject.given
        images = {"augmented": given.augmented, "reference": given.reference, "own": self.subject.batches}[source]
        assert images is not None  # or the cause would not be tried
        return images


def _all(changes: Sequence[Transform], x: Tensor) -> Tensor:
    for change in changes:
        x = change(x)
    return x
