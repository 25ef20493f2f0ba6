"""Measures the inputs of each use of a layer that one forward calls more than once."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnlab.health.evidence import Evidence, Floats
from bnlab.health.subject import Subject
from bnlab.norm.recalibrate import evaluation_mode

IMAGES = 32


@dataclass(frozen=True, kw_only=True)
class Use:
    """The inputs of a layer in one of its uses. C channels, N images."""

    mean: Floats
    """C"""
    variance: Floats
    """C"""
    image_means: Floats
    """N x C"""
    image_squares: Floats
    """means of the squared distances from the first use's mean, N x C"""


@dataclass(frozen=True, kw_only=True)
class Uses:
    """The uses of layers that one forward calls more than once, in order."""

    images: int
    layers: Mapping[str, tuple[Use, ...]]


def gather(subject: Subject, evidence: Evidence) -> dict[str, Any]:
    """Measure "uses" if there is such a layer, by one forward in evaluation."""
    names = [name for name, layer in evidence.layers.items() if layer.calls > 1 and layer.family == "batch"]
    if not names:
        return {}
    batch = subject.batches.sample(IMAGES)
    found: dict[str, list[Use]] = {name: [] for name in names}

    def note(name: str, args: Any, kwargs: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(x, Tensor) and x.numel():
            found[name].append(_measure(x, found[name][0].mean if found[name] else None))

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(evaluation_mode(subject.network))
        for name in names:
            layer: nn.Module = subject.layers[name]
            handle = layer.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: note(name, args, kwargs), with_kwargs=True
            )
            stack.callback(handle.remove)
        with subject.noting("the uses of layers could not be measured"):
            subject.call(batch)
            return {"uses": Uses(images=len(batch), layers={name: tuple(uses) for name, uses in found.items()})}
    return {}


def _measure(x: Tensor, origin: Floats | None) -> Use:
    values = x.detach().double().flatten(2) if x.ndim > 2 else x.detach().double()[..., None]  # N x C x positions
    image_means = values.mean(2)
    mean = image_means.mean(0)  # C
    centre = mean if origin is None else torch.from_numpy(np.ascontiguousarray(origin)).to(mean)
    variance = (values - mean[:, None]).square().mean((0, 2))
    squares = (values - centre[:, None]).square().mean(2)
    arrays = (t.cpu().numpy() for t in (mean, variance, image_means, squares))
    mean_array, variance_array, means_array, squares_array = arrays
    return Use(mean=mean_array, variance=variance_array, image_means=means_array, image_squares=squares_array)
