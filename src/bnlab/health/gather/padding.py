"""Measures the inputs of layers with and without the positions that the caller calls padding, in one more pass."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnlab.errors import UsageError
from bnlab.health.batches import Batch
from bnlab.health.evidence import Evidence, Floats
from bnlab.health.subject import Subject
from bnlab.norm import moments
from bnlab.norm.moments import Moments
from bnlab.norm.recalibrate import evaluation_mode


@dataclass(frozen=True, kw_only=True)
class PaddedLayer:
    """The inputs of one layer in evaluation, N x C x L, with all positions and without padding; C each."""

    mean: Floats
    variance: Floats
    mean_without: Floats
    variance_without: Floats
    pairs: int
    """images that have padded positions and others"""
    difference: Floats
    """mean over these images of: the mean of its padded positions - that of its other positions, 2 x C; first of the
    values, then of their squared distances from the mean of all"""
    error: Floats
    """standard error of that, 2 x C; NaN for fewer than two pairs"""


@dataclass(frozen=True, kw_only=True)
class Padding:
    """What padding does to the statistics."""

    share: float
    """of all positions"""
    layers: Mapping[str, PaddedLayer]
    """by name: those whose input is N x C x L, with the L of the caller's mask"""


class _Sums:
    """Adds up the inputs of a layer."""

    def __init__(self, centre: Floats) -> None:
        self.centre = torch.from_numpy(centre)[:, None]  # C x 1
        self.all: list[Moments] = []
        self.without: list[Moments] = []
        self.pairs, self.difference, self.squares = 0, 0.0, 0.0

    def add(self, x: Tensor, padded: Tensor) -> None:
        """x: N x C x L; padded: N x L, bool."""
        self.all = [moments.merge([*self.all, moments.measure(x).cpu()])]
        rows = x.transpose(1, 2)[~padded]  # values x C
        if len(rows):
            self.without = [moments.merge([*self.without, moments.measure(rows).cpu()])]
        mask = padded[:, None].double().cpu()  # N x 1 x L
        values = x.double().cpu()
        values = torch.cat([values, (values - self.centre).square()], 1)  # N x 2C x L
        number = mask.sum(2)  # N x 1
        both = ((number > 0) & (number < mask.shape[2])).flatten()
        inside = (values * mask).sum(2)[both] / number[both]
        outside = (values * (1 - mask)).sum(2)[both] / (mask.shape[2] - number[both])
        apart = (inside - outside).numpy()  # images x 2C
        self.pairs += len(apart)
        self.difference = self.difference + apart.sum(0)
        self.squares = self.squares + (apart**2).sum(0)

    def layer(self) -> PaddedLayer | None:
        whole = self.all[0]
        without = self.without[0] if self.without else whole
        if whole.count < 2 or without.count < 2:
            return None
        n = self.pairs
        mean = np.asarray(self.difference / max(n, 1))
        spread = (np.asarray(self.squares) - n * mean**2).clip(min=0)
        return PaddedLayer(
            mean=whole.mean.numpy(),
            variance=whole.variance(unbiased=True).numpy(),
            mean_without=without.mean.numpy(),
            variance_without=without.variance(unbiased=True).numpy(),
            pairs=n,
            difference=mean.reshape(2, -1),
            error=(np.sqrt(spread / (n * (n - 1))) if n > 1 else np.full_like(mean, np.nan)).reshape(2, -1),
        )


def gather(subject: Subject, evidence: Evidence) -> dict[str, Any]:
    """The part "padding", if the caller tells which positions are padding.

    Raises:
        UsageError: the mask is not bool, N x L.
    """
    if subject.given.padding is None or not subject.layers:
        return {}
    with subject.noting("padding could not be measured"):
        return {"padding": _measure(subject, evidence)}
    return {}


def _measure(subject: Subject, evidence: Evidence) -> Padding | None:
    sums: dict[str, _Sums] = {}
    padded, positions, mask = 0, 0, torch.zeros(0)

    def hook(name: str, args: Any, kwargs: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        sample = evidence.layers[name].evaluation
        if sample is not None and x.ndim == 3 and (len(x), x.shape[2]) == mask.shape:
            sums.setdefault(name, _Sums(sample.mean)).add(x, mask.to(x.device))

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(evaluation_mode(subject.network))
        for layer in evidence.normalised:
            if layer.inputs > 1:  # it may leave the padding out
                continue
            module: nn.Module = subject.layers[layer.name]
            handle = module.register_forward_pre_hook(
                lambda _, args, kwargs, name=layer.name: hook(name, args, kwargs), with_kwargs=True
            )
            stack.callback(handle.remove)
        for batch in subject.batches:
            mask = _mask(subject, batch)
            padded, positions = padded + int(mask.sum()), positions + mask.numel()
            subject.call(batch)
    if not sums:
        subject.notes.append(
            f"padding= was given for sequences of {mask.shape[1]} positions, but no layer gets N x C x {mask.shape[1]}"
        )
        return None
    layers = {name: measured for name, found in sums.items() if (measured := found.layer()) is not None}
    return Padding(share=padded / positions, layers=layers)


def _mask(subject: Subject, batch: Batch) -> Tensor:
    assert subject.given.padding is not None
    mask = torch.as_tensor(subject.given.padding(batch.whole))
    if mask.dtype != torch.bool or mask.ndim != 2 or len(mask) != len(batch):
        raise UsageError(
            f"padding= gave {mask.dtype} of shape {list(mask.shape)} for a batch of {len(batch)}",
            f"return bool, {len(batch)} x positions, true for padding",
        )
    return mask
