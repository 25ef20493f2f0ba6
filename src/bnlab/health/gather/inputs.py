"""Asks which changes of the images, or of eps, would make the layers' inputs fit the running statistics.

A few images are changed as they enter the network, and the inputs of its layers are measured. Nothing is run for layers
whose statistics fit already. How far inputs are from the statistics is `statistics.shifts`, averaged over channels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab.health.batches import Batch, logits
from bnlab.health.compare import Comparison
from bnlab.health.evidence import Evidence, LayerEvidence, Sample
from bnlab.health.gather.passes import measure_inputs
from bnlab.health.gather.pixels import Change, changes, describe_pixels
from bnlab.health.statistics import shift_of
from bnlab.health.subject import Subject
from bnlab.norm.recalibrate import evaluation_mode

FITS = 0.15  # standard deviations: at a smaller distance nothing is asked
_SIZE_FITS = 0.1  # a wrong size moves statistics less
_CANDIDATE, _SCORED, _RESIZED = 64, 256, 32  # images
_FACTORS = (0.5, 0.71, 1.41, 2.0)
_EPS = (1e-5, 1e-3, 1e-2, 1e-1)
_SMALLEST = 16  # pixels of a scaled image's side

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What one change gives."""

    name: str
    distance: float
    """mean distance from the running statistics, in their standard deviations"""
    swapped: bool = False
    """whether it swaps red and blue"""
    value: float = 1.0
    """the factor of the size, or eps"""
    change: Change | None = None
    """of the values, if it is one"""


@dataclass(frozen=True, kw_only=True)
class Trials:
    """Changes that were tried, the best first; none if the statistics fit as it is."""

    layer: str
    """whose inputs were measured, or the first of them"""
    present: Trial
    others: tuple[Trial, ...] = ()
    cost: Comparison | None = None
    """the scores as it is (before) and with the best change (after)"""
    certainty: float | None = None
    """by how many standard errors the outputs' mean entropy is lower with the best change; None: not classes"""

    @property
    def best(self) -> Trial | None:
        return self.others[0] if self.others else None


@dataclass(frozen=True, kw_only=True)
class Colours:
    """Which mean colour of images explains the running means of the first layer, if its input is affine in them."""

    layer: str
    unexplained: float
    """mean over channels of the distance of the running means from what the best colour gives, in running deviations"""
    size: float
    """mean over channels of the distance of the running means from what 0 gives"""
    trained: tuple[float, ...]
    """the mean colour by the running means, in the units of the network's input"""
    present: tuple[float, ...]
    """the mean colour of the images"""


def gather(subject: Subject, evidence: Evidence) -> dict[str, Any]:
    """The parts preprocessing, resolution, eps and colours."""
    layers = [x for x in evidence.normalised if x.calls and x.depth is not None and shift_of(x) is not None]
    if not layers or layers[0].depth != min(x.depth for x in evidence.layers.values() if x.depth is not None):
        return {}
    parts: dict[str, Any] = {}
    for what, ask in (("preprocessing", _preprocessing), ("resolution", _resolution), ("eps", _eps)):
        if what not in subject.parts and not (what == "preprocessing" and "colours" in subject.parts):
            continue
        with subject.noting(f"whether {what} explains the statistics was not measured"):
            parts |= ask(subject, layers)
    return parts


class _Entrance:
    """Sees, and may change, the images as they enter the network."""

    def __init__(self) -> None:
        self.change: Transform | None = None
        self.images: Tensor | None = None

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if found is None or found.ndim != 4 or not found.is_floating_point():
            return None
        self.images = found
        if self.change is None:
            return None
        changed = self.change(found)
        return tuple(changed if x is found else x for x in args), {
            key: changed if x is found else x for key, x in kwargs.items()
        }


@contextmanager
def entrance_of(network: nn.Module) -> Iterator[_Entrance]:
    entrance = _Entrance()
    handle = network.register_forward_pre_hook(entrance, with_kwargs=True)
    try:
        yield entrance
    finally:
        handle.remove()


def _measure(subject: Subject, layers: Sequence[LayerEvidence], batches: Sequence[Batch]) -> dict[str, Sample]:
    """The inputs of the layers in evaluation; the forward ends at the last of them."""
    modules = {layer.name: subject.layers[layer.name] for layer in layers}
    return measure_inputs(subject.network, modules, batches, subject.call, stop=layers[-1].name)[0]


def _distances(layers: Sequence[LayerEvidence], found: dict[str, Sample]) -> list[float]:
    """Of each layer; infinite if it was not reached or got values that are not finite."""
    distances = [shift_of(layer, found[layer.name]) if layer.name in found else None for layer in layers]
    return [np.inf if d is None or np.isnan(d) else d for d in distances]


def _distance(layers: Sequence[LayerEvidence], found: dict[str, Sample]) -> float:
    """The mean over layers."""
    return float(np.mean(_distances(layers, found)))


def _preprocessing(subject: Subject, layers: Sequence[LayerEvidence]) -> dict[str, Any]:
    first = layers[:1]
    present = _distance(first, {first[0].name: first[0].evaluation} if first[0].evaluation else {})
    with entrance_of(subject.network) as entrance:
        _measure(subject, first, [subject.batches.sample(1)])
        if entrance.images is None or entrance.images.shape[1] not in (1, 3):
            return {}
        as_it_is = Trial(name="", distance=present)
        if present <= FITS:
            return {"preprocessing": Trials(layer=first[0].name, present=as_it_is)}
        batches = subject.batches.some(_CANDIDATE)
        parts = _colours(subject, entrance, first[0], batches)
        if entrance.images.shape[1] == 1:
            return parts
        pixels: list[Tensor] = []
        entrance.change = lambda x: pixels.append(x) or x  # type: ignore[func-returns-value]
        found = _measure(subject, first, batches)
        name, possible = changes(describe_pixels(pixels), subject.given.mean, subject.given.std)
        as_it_is = Trial(name=name, distance=_distance(first, found))
        tried: list[Trial] = []
        for change in possible:
            entrance.change = change.apply
            distance = _distance(first, _measure(subject, first, batches))
            tried.append(Trial(name=change.name, distance=distance, swapped=change.swapped, change=change))
        tried.sort(key=lambda trial: trial.distance)
        cost, certainty = None, None
        if tried and tried[0].distance < 0.9 * as_it_is.distance:
            best = tried[0].change
            assert best is not None
            cost, certainty = _outputs(subject, lambda on: setattr(entrance, "change", best.apply if on else None))
    trials = Trials(layer=first[0].name, present=as_it_is, others=tuple(tried), cost=cost, certainty=certainty)
    return {"preprocessing": trials} | parts


@torch.no_grad()
def _outputs(subject: Subject, switch: Callable[[bool], object]) -> tuple[Comparison | None, float | None]:
    """What a change does to the scores of some images, and to the entropy of the outputs."""
    scores: dict[bool, list[Tensor]] = {False: [], True: []}
    entropies: dict[bool, list[Tensor]] = {False: [], True: []}
    with evaluation_mode(subject.network):
        for on in (False, True):
            switch(on)
            for batch in subject.batches.some(_SCORED):
                output = subject.call(batch)
                score, values = subject.batches.score(output, batch), logits(output)
                if score is not None:
                    scores[on].append(score)
                if values is not None and values.ndim == 2 and values.shape[1] > 2 and len(values) == len(batch):
                    p = values.double().log_softmax(1)
                    entropies[on].append(-(p.exp() * p).sum(1).cpu())
        switch(False)
    cost = subject.batches.compare(*(torch.cat(scores[on]).numpy() for on in (False, True))) if scores[True] else None
    if not entropies[True]:
        return cost, None
    less = torch.cat(entropies[False]) - torch.cat(entropies[True])
    error = less.std() / len(less) ** 0.5
    return cost, float(less.mean() / error) if len(less) > 1 and error > 0 else None


def _colours(subject: Subject, entrance: _Entrance, first: LayerEvidence, batches: Sequence[Batch]) -> dict[str, Any]:
    """Images of one colour tell how the mean of the layer's input depends on the mean colour, if it is affine."""
    assert entrance.images is not None and first.running_mean is not None and first.running_variance is not None
    channels = entrance.images.shape[1]
    if first.channels < 3 * channels + 4:
        return {}
    sums: list[Tensor] = []
    entrance.change = lambda x: sums.append(x.double().mean((0, 2, 3)).cpu()) or x  # type: ignore[func-returns-value]
    _measure(subject, [first], batches)
    colour = torch.stack(sums).mean(0).numpy()
    given = np.concatenate(
        [np.zeros((1, channels)), np.eye(channels), np.ones((1, channels)), 0.5 * np.ones((1, channels))]
    )
    means = []
    for row in given:
        constant = torch.tensor(row).view(1, -1, 1, 1)
        entrance.change = lambda x, constant=constant: constant.to(x).expand_as(x).contiguous()
        found = _measure(subject, [first], [subject.batches.sample(1)])
        if first.name not in found:
            return {}
        means.append(found[first.name].mean)
    entrance.change = None
    size = np.sqrt(first.running_variance + 1e-4 * np.median(first.running_variance) + 1e-12)
    slopes = (np.stack(means[1 : channels + 1], axis=1) - means[0][:, None]) / size[:, None]  # C x channels
    for row, mean in zip(given[channels + 1 :], means[channels + 1 :], strict=True):
        if np.abs((mean - means[0]) / size - slopes @ row).max() > 1e-3 * (1 + np.abs(slopes).max()):
            return {}  # not affine
    target = (first.running_mean - means[0]) / size
    trained = np.linalg.lstsq(slopes, target, rcond=None)[0]
    unexplained = float(np.abs(target - slopes @ trained).mean())
    return {
        "colours": Colours(
            layer=first.name,
            unexplained=unexplained,
            size=float(np.abs(target).mean()),
            trained=tuple(map(float, trained)),
            present=tuple(map(float, colour)),
        )
    }


def _resolution(subject: Subject, layers: Sequence[LayerEvidence]) -> dict[str, Any]:
    present = float(np.mean([shift_of(layer) for layer in layers]))
    as_it_is = Trial(name="", distance=present)
    with entrance_of(subject.network) as entrance:
        _measure(subject, layers[:1], [subject.batches.sample(1)])
        if entrance.images is None or entrance.images.shape[1] not in (1, 3):
            return {}
        height, width = entrance.images.shape[2:]
        if present <= _SIZE_FITS:
            return {"resolution": Trials(layer=layers[0].name, present=as_it_is)}
        batches = subject.batches.some(_RESIZED)
        as_it_is = Trial(name=f"{height} x {width}", distance=_distance(layers, _measure(subject, layers, batches)))
        tried: list[Trial] = []
        for factor in _FACTORS:
            size = round(height * factor), round(width * factor)
            if min(size) < _SMALLEST:
                continue
            entrance.change = lambda x, size=size: F.interpolate(x, size, mode="bilinear", antialias=True)
            try:
                distance = _distance(layers, _measure(subject, layers, batches))
            except Exception:  # the network takes one size alone
                continue
            tried.append(Trial(name=f"{size[0]} x {size[1]}", distance=distance, value=factor))
    tried.sort(key=lambda trial: trial.distance)
    return {"resolution": Trials(layer=layers[0].name, present=as_it_is, others=tuple(tried))}


def _eps(subject: Subject, layers: Sequence[LayerEvidence]) -> dict[str, Any]:
    """The first layer's input depends on no eps: if it does not fit, eps cannot be what is wrong. Of the later layers,
    the median counts, since the deepest ones see few values of each image, which fit less by chance.
    """
    later = layers[1:]
    if not later:
        return {}
    now = float(np.median([shift_of(layer) or 0.0 for layer in later]))
    own = {layer.eps for layer in layers}
    as_it_is = Trial(name=", ".join(f"{eps:g}" for eps in sorted(own)), distance=now, value=max(own))
    if now <= FITS / 2 or (shift_of(layers[0]) or 0) > FITS:
        return {"eps": Trials(layer=later[0].name, present=as_it_is)}
    batches = subject.batches.some(_CANDIDATE)
    modules = [
        (subject.layers[layer.name], layer.eps) for layer in layers if hasattr(subject.layers[layer.name], "eps")
    ]

    def set_eps(eps: float | None) -> None:
        for module, old in modules:
            module.eps = old if eps is None else eps  # type: ignore[assignment]

    tried: list[Trial] = []
    for eps in _EPS:
        if all(abs(np.log(eps / max(old, 1e-12))) < 0.1 for old in own):
            continue
        set_eps(eps)
        distance = float(np.median(_distances(later, _measure(subject, layers, batches))))
        tried.append(Trial(name=f"{eps:g}", distance=distance, value=eps))
    tried.sort(key=lambda trial: trial.distance)
    set_eps(None)
    cost = None
    if tried and tried[0].distance < 0.5 * now:
        cost, _ = _outputs(subject, lambda on: set_eps(tried[0].value if on else None))
    return {"eps": Trials(layer=later[0].name, present=as_it_is, others=tuple(tried), cost=cost)}
