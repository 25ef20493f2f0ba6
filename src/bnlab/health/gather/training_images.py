"""Measures training images, with and without augmentation, and what dropout does to the layers' inputs."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnlab.health.batches import Batch, Batches
from bnlab.health.evidence import Evidence, Floats, Sample
from bnlab.health.gather.passes import measure_inputs
from bnlab.health.gather.statistics_switch import StatisticsSwitch
from bnlab.health.subject import Subject
from bnlab.norm.recalibrate import evaluation_mode

Population = Mapping[str, tuple[Tensor, Tensor]]
_DROPOUT_IMAGES, _DRAWS = 32, 4


@dataclass(frozen=True, kw_only=True)
class ReferenceEvidence:
    """The inputs of each layer for the training images without augmentation."""

    evaluation: Mapping[str, Sample]
    """where all layers normalise by their running statistics"""
    batch: Mapping[str, Sample]
    """where all layers normalise by batch statistics"""
    images: int


@dataclass(frozen=True, kw_only=True)
class AugmentedEvidence:
    """The inputs of each layer, normalised by batch statistics, for augmented and for plain training images."""

    augmented: Mapping[str, Sample]
    plain: Mapping[str, Sample]
    by_augmented: Floats | None = None
    """the score of each of the images diagnosed, by the statistics of the augmented ones"""
    by_plain: Floats | None = None


@dataclass(frozen=True, kw_only=True)
class DropoutEvidence:
    """How dropout changes the variance of the layers after it; empty if none comes before a layer."""

    ratios: Mapping[str, float]
    """by layer: the median over channels of the input's variance with dropout on over that with dropout off"""
    errors: Mapping[str, float]
    """the standard error of the ratio's logarithm, by the draws of the dropout and the channels"""
    modules: tuple[str, ...] = ()


def gather(subject: Subject, evidence: Evidence) -> dict[str, Any]:
    """The parts reference, augmented and dropout."""
    parts: dict[str, Any] = {}
    if not subject.layers:
        return parts
    given = subject.given
    population: Population = {}
    with subject.noting("the training images were not measured"):
        if given.reference is not None:
            parts["reference"], population = _reference(subject, given.reference)
        if given.augmented is not None:
            parts["augmented"] = _augmented(subject, evidence, given.augmented, parts.get("reference"), population)
    if "dropout" not in subject.parts:
        return parts
    with subject.noting("what dropout does was not measured"):
        parts["dropout"] = _dropout(subject)
    return parts


def _reference(subject: Subject, batches: Batches) -> tuple[ReferenceEvidence, Population]:
    network, layers = subject.network, subject.layers
    evaluation, _ = measure_inputs(network, layers, batches, subject.call)
    sizes: list[int] = []

    def call(batch: Batch) -> object:
        sizes.append(len(batch))
        return subject.call(batch)

    batch, population = measure_inputs(network, layers, batches, call, "batch")
    return ReferenceEvidence(evaluation=evaluation, batch=batch, images=sum(sizes)), population


def _augmented(
    subject: Subject,
    evidence: Evidence,
    batches: Batches,
    reference: ReferenceEvidence | None,
    plain_population: Population,
) -> AugmentedEvidence:
    augmented, population = measure_inputs(subject.network, subject.layers, batches, subject.call, "batch")
    own = {name: layer.batch for name, layer in evidence.layers.items() if layer.batch is not None}
    scores = evidence.scores
    by_augmented = by_plain = None
    if scores is not None:
        by_augmented = _scores(subject, population)
        by_plain = scores.population if reference is None else _scores(subject, plain_population)
    plain = own if reference is None else reference.batch
    return AugmentedEvidence(augmented=augmented, plain=plain, by_augmented=by_augmented, by_plain=by_plain)


@torch.no_grad()
def _scores(subject: Subject, population: Population) -> Floats | None:
    """The scores of all images by these statistics."""
    switch, found = StatisticsSwitch(subject.layers), []
    with evaluation_mode(subject.network):
        switch.to("population", population)
        for batch in subject.batches:
            score = subject.batches.score(subject.call(batch), batch)
            if score is not None:
                found.append(score)
        switch.to("running")
    return torch.cat(found).numpy() if found else None


def _dropout(subject: Subject) -> DropoutEvidence:
    active = {
        name: module
        for name, module in subject.network.named_modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    }
    none = DropoutEvidence(ratios={}, errors={})
    if not active:
        return none
    before, after = _order(subject, active)
    if not before:
        return none
    batches = subject.batches.some(_DROPOUT_IMAGES)
    off = measure_inputs(subject.network, subject.layers, batches, subject.call, "batch")[0]

    seeds = itertools.count()

    def call(batch: Batch) -> object:
        for name in before:
            active[name].training = True
        torch.manual_seed(next(seeds))  # `evaluation_mode` restores the generator after each draw
        return subject.call(batch)

    draws = [measure_inputs(subject.network, subject.layers, batches, call, "batch")[0] for _ in range(_DRAWS)]
    ratios: dict[str, float] = {}
    errors: dict[str, float] = {}
    for name in after:
        if name not in off or not all(name in draw for draw in draws):
            continue
        live = off[name].variance > 1e-6 * max(float(np.median(off[name].variance)), 1e-12)
        if not live.any():
            continue
        logs = np.log(np.stack([d[name].variance[live] for d in draws]).clip(1e-300) / off[name].variance[live])
        mean = logs.mean(0)  # C: over draws
        ratios[name] = float(np.exp(np.median(mean)))
        errors[name] = float(logs.std(0, ddof=1).mean() / np.sqrt(_DRAWS) / np.sqrt(max(1.0, len(mean) / 4)))
    return DropoutEvidence(ratios=ratios, errors=errors, modules=before)


def _order(subject: Subject, active: Mapping[str, nn.Module]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The dropout modules that run before some layer, and the layers that run after some dropout."""
    called: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, module in (*active.items(), *subject.layers.items())
    ]
    try:
        with torch.no_grad(), evaluation_mode(subject.network):
            subject.call(subject.batches.sample(1))
    finally:
        for handle in handles:
            handle.remove()
    drops = [i for i, name in enumerate(called) if name in active]
    norms = [i for i, name in enumerate(called) if name in subject.layers]
    before = dict.fromkeys(called[i] for i in drops if norms and i < norms[-1])
    after = dict.fromkeys(called[i] for i in norms if drops and i > drops[0])
    return tuple(before), tuple(after)
