"""Measures the inputs of the layers for each source of images, such as a camera, by itself.

The images are run once more, those of each source together, by the running statistics. If the sources differ, and there
are scores, the images are run twice more: to measure the population statistics of each source, and to score its images
by them. Memory does not grow with the number of batches, but for the scores.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map

from bnlab.errors import UsageError, plural
from bnlab.health.batches import Batch
from bnlab.health.compare import Comparison
from bnlab.health.evidence import Evidence, Floats, Sample
from bnlab.health.gather.passes import measuring
from bnlab.health.gather.recorder import Recorder
from bnlab.health.gather.statistics_switch import StatisticsSwitch
from bnlab.health.statistics import FALSE_DISCOVERIES, significant
from bnlab.health.subject import Subject
from bnlab.norm.recalibrate import evaluation_mode

FEWEST = 16  # images of a source
MEAN_OFF = 0.1  # standard deviations of all images, as for stale statistics
_MOST = 32  # sources


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The sources of the images."""

    images: Mapping[str, int]
    """of each source that has at least 16"""
    layers: Mapping[str, Mapping[str, Sample]]
    """by source, then by layer: its inputs where all layers normalise by their running statistics"""
    distances: Mapping[str, Floats]
    """by layer: the largest distance of a source's mean from all images', in standard deviations; C"""
    off: Mapping[str, NDArray[np.bool_]]
    """by layer: the channels where that is more than 0.1, and not by chance; C"""
    cost: Comparison | None = None
    """the scores by the population statistics of all images and by those of each source; None: not measured"""


def gather(subject: Subject, evidence: Evidence) -> dict[str, Any]:
    """The part "sources", if the caller tells the sources and there are two of 16 images or more.

    Raises:
        UsageError: there is not one source for each image, or there are too many.
    """
    if subject.given.sources is None or not subject.layers:
        return {}
    with subject.noting("the sources could not be compared"):
        return {"sources": _measure(subject, evidence)}
    return {}


def _measure(subject: Subject, evidence: Evidence) -> Sources | None:
    switch = StatisticsSwitch(subject.layers)
    recorders: dict[str, Recorder] = {}
    counts: dict[str, int] = {}
    with torch.no_grad(), evaluation_mode(subject.network):
        for batch in subject.batches:
            for source, rows in _sources_of(subject, batch):
                recorder = recorders.setdefault(source, Recorder(subject.layers, images=True))
                if len(recorders) > _MOST:
                    raise UsageError(f"sources= names more than {_MOST} sources", "return fewer different values")
                with measuring(subject.layers, switch, recorder, recorder):
                    subject.call(_select(batch, rows))
                recorder.end_batch(len(rows))
                counts[source] = counts.get(source, 0) + len(rows)
    kept = {source: number for source, number in sorted(counts.items()) if number >= FEWEST}
    if len(kept) < 2:
        subject.notes.append(
            f"the sources were not compared: {plural(len(kept), 'source')} of {len(counts)} "
            f"{'has' if len(kept) == 1 else 'have'} at least {FEWEST} images, and two are needed"
        )
        return None
    samples = {source: recorders[source].samples() for source in kept}
    found: dict[str, tuple[Floats, NDArray[np.bool_]]] = {}
    for layer in evidence.normalised:
        own = [samples[source].get(layer.name) for source in kept]
        if layer.calls == 1 and all(sample is not None and sample.between_images is not None for sample in own):
            tests = len(kept) * len(evidence.normalised)
            found[layer.name] = _compare([s for s in own if s is not None], [*kept.values()], layer.eps, tests)
    sources = Sources(
        images=kept,
        layers=samples,
        distances={name: far for name, (far, _) in found.items()},
        off={name: off for name, (_, off) in found.items()},
    )
    pooled = None if evidence.scores is None else evidence.scores.population
    if pooled is None or len(pooled) != evidence.images or not any(off.mean() > 0.5 for off in sources.off.values()):
        return sources
    own_scores = _scores(subject, switch, kept, len(pooled))
    measured = ~np.isnan(own_scores)  # images of the sources that have too few are left out
    cost = subject.batches.compare(pooled[measured], own_scores[measured])
    return replace(sources, cost=cost)


def _compare(samples: list[Sample], numbers: list[int], eps: float, tests: int) -> tuple[Floats, NDArray[np.bool_]]:
    """How far the sources' means are from that of all images at most, and which channels are off: C each.

    The error of a source's mean follows from the variance of single images' means; the share of channels that are
    called off by chance is divided by the number of such tests.
    """
    weights = np.array(numbers, np.float64) / sum(numbers)  # S
    means = np.stack([sample.mean for sample in samples])  # S x C
    spreads = np.stack([s.between_images for s in samples if s.between_images is not None])  # S x C
    mean = weights @ means
    variance = weights @ np.stack([sample.variance for sample in samples]) + weights @ (means - mean) ** 2
    far = np.abs(means - mean) / np.sqrt(variance + eps)  # S x C
    off = np.zeros(far.shape, bool)
    for i, number in enumerate(numbers):
        others = sum(numbers) - number
        rest = (mean - weights[i] * means[i]) / (1 - weights[i])
        rest_spread = (weights @ spreads - weights[i] * spreads[i]) / (1 - weights[i])
        error = np.sqrt(spreads[i] / number + rest_spread / others)
        off[i] = significant(means[i] - rest, error, FALSE_DISCOVERIES / tests) & (far[i] > MEAN_OFF)
    return np.asarray(far.max(0)), np.asarray(off.any(0))


def _sources_of(subject: Subject, batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """The sources in a batch, each with the rows of its images."""
    assert subject.given.sources is not None
    given = subject.given.sources(batch.whole)
    labels = given.tolist() if isinstance(given, Tensor | np.ndarray) else list(given)
    if len(labels) != len(batch):
        raise UsageError(
            f"sources= gave {plural(len(labels), 'value')} for a batch of {plural(len(batch), 'image')}",
            "return the source of each image",
        )
    names = [str(label) for label in labels]
    for source in dict.fromkeys(names):
        rows = [i for i, name in enumerate(names) if name == source]
        yield source, torch.tensor(rows, device=subject.device)


def _select(batch: Batch, rows: Tensor) -> Batch:
    """These images of the batch, as a batch; what in it has not one row an image is left as it is."""
    size = len(batch)

    def part(value: Any) -> Any:
        has_rows = isinstance(value, Tensor) and value.ndim and len(value) == size
        return value[rows.to(value.device)] if has_rows else value

    return Batch(
        tree_map(part, batch.whole), tree_map(part, batch.args), tree_map(part, dict(batch.kwargs)), part(batch.labels)
    )


def _join(first: Batch, second: Batch) -> Batch:
    """The images of both, as a batch."""
    sizes = len(first), len(second)

    def both(a: Any, b: Any) -> Any:
        tensors = isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim and b.ndim
        return torch.cat([a, b]) if tensors and (len(a), len(b)) == sizes else a

    return Batch(
        tree_map(both, first.whole, second.whole),
        tree_map(both, first.args, second.args),
        tree_map(both, dict(first.kwargs), dict(second.kwargs)),
        None if first.labels is None else both(first.labels, second.labels),
    )


def _scores(subject: Subject, switch: StatisticsSwitch, kept: Mapping[str, int], images: int) -> Floats:
    """The score of each image by its source's population statistics; NaN where the source has too few images."""
    scores = np.full(images, np.nan)
    recorders = {source: Recorder(subject.layers, images=False) for source in kept}
    waiting: dict[str, Batch] = {}
    with torch.no_grad(), evaluation_mode(subject.network):
        switch.to("batch")

        def measure(source: str) -> None:
            batch = waiting.pop(source)
            with measuring(subject.layers, switch, recorders[source], recorders[source]):
                subject.call(batch)
            recorders[source].end_batch(len(batch))

        for batch in subject.batches:
            for source, rows in _sources_of(subject, batch):
                if source in kept:  # batches of the usual size, since statistics of smaller ones are others
                    own = _select(batch, rows)
                    waiting[source] = _join(waiting[source], own) if source in waiting else own
                    if len(waiting[source]) >= subject.usual:
                        measure(source)
        for source in [*waiting]:
            if not recorders[source].number or len(waiting[source]) > subject.usual // 2:
                measure(source)
        statistics = {source: recorder.population(switch) for source, recorder in recorders.items()}
        start = 0
        for batch in subject.batches:
            for source, rows in _sources_of(subject, batch):
                if source in kept:
                    switch.to("population", statistics[source])
                    own = _select(batch, rows)
                    score = subject.batches.score(subject.call(own), own)
                    assert score is not None
                    scores[start + rows.cpu().numpy()] = score.numpy()
            start += len(batch)
        switch.to("running")
    return scores
