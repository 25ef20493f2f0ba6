"""Measures an averaged model (EMA, SWA) by its own statistics and by recalibrated ones, beside the raw model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from bnlab.errors import UsageError
from bnlab.health.evidence import Evidence, LayerEvidence, Scores
from bnlab.health.gather.layers import describe, find_layers
from bnlab.health.gather.passes import run_passes
from bnlab.health.restore import restored
from bnlab.health.subject import Subject


@dataclass(frozen=True, kw_only=True)
class Averaged:
    """What the passes over all images say of the averaged model."""

    scores: Scores | None
    """by its own running statistics, by batch statistics and by recalibrated ones"""
    raw: float | None
    """mean score of the model that was averaged"""
    layers: Mapping[str, LayerEvidence]
    """of the averaged model, with its population statistics"""
    buffers: Literal["the raw model's", "initial", "others"]
    """what its running statistics are"""
    use_buffers: bool | None
    """of torch's AveragedModel: whether it averages buffers, too; None: of another class"""
    weights: int | None
    """of torch's AveragedModel: how many sets of weights it has averaged"""


def gather(subject: Subject, evidence: Evidence) -> dict[str, Any]:
    """Run all images through the averaged model.

    Raises:
        UsageError: it is not an nn.Module.
    """
    given = subject.given.averaged
    if given is None:
        return {}
    if not isinstance(given, nn.Module):
        raise UsageError(
            f"averaged is of the type {type(given).__name__}", "pass the averaged model itself, an nn.Module"
        )
    network = unwrapped(given, subject.network)
    layers = find_layers(network)
    passes = None
    task = subject.progress.task("the averaged model", 3 * evidence.images, "images")
    with subject.noting("the averaged model cannot be run on the images"), restored(given), task as progress:
        described = {name: describe(name, layer) for name, layer in layers.items()}
        passes = run_passes(network, layers, subject.batches, progress)
    if passes is None:
        return {}
    raw = None if evidence.scores is None else evidence.scores.means()["running"]
    use_buffers, weights = getattr(given, "use_buffers", None), getattr(given, "n_averaged", None)
    return {
        "averaged": Averaged(
            scores=passes.scores,
            raw=raw,
            layers={name: replace(layer, batch=passes.batch.get(name)) for name, layer in described.items()},
            buffers=_buffers(layers, subject.layers),
            use_buffers=use_buffers if isinstance(use_buffers, bool) else None,
            weights=int(weights) if isinstance(weights, torch.Tensor) else None,
        )
    }


def unwrapped(model: nn.Module, like: nn.Module) -> nn.Module:
    """The network in a model that is a wrapper: torch's AveragedModel, timm's ModelEma, DistributedDataParallel..."""
    while type(model) is not type(like):
        inner = getattr(model, "_orig_mod", None)
        if inner is None and [name for name, _ in model.named_children()] == ["module"]:
            inner = model.module
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _buffers(
    layers: Mapping[str, nn.Module], raw: Mapping[str, nn.Module]
) -> Literal["the raw model's", "initial", "others"]:
    pairs = [(layer._buffers.get("running_mean"), layer._buffers.get("running_var")) for layer in layers.values()]
    known = [(mean, var) for mean, var in pairs if mean is not None and var is not None]
    if known and all(not mean.any() and bool((var == 1).all()) for mean, var in known):
        return "initial"
    if not known or layers.keys() != raw.keys():
        return "others"
    for name, layer in layers.items():
        for key in ("running_mean", "running_var"):
            own, other = layer._buffers.get(key), raw[name]._buffers.get(key)
            if own is not None and (other is None or own.shape != other.shape or not torch.equal(own, other.to(own))):
                return "others"
    return "the raw model's"
