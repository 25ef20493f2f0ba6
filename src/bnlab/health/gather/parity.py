"""Compares the outputs of a network with those of another way to run it, and tells faults from rounding.

A difference is the largest one of any output value, in standard deviations of that output; infinite where one value is
finite and the other is not. Rounding alone makes some: what the network's own outputs are off from those in float64,
which is measured only where the difference is larger than CLOSE.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from bnlab.health.batches import Batch, logits
from bnlab.health.subject import Subject
from bnlab.norm.model_utils import copy_module

IMAGES = 8
CLOSE = 1e-4  # of the outputs' standard deviation, in float32
_CLOSE_UNKNOWN = 1e-3  # where the model does not run in float64, so that its own rounding is not known
WORSE = 4.0  # how many times the rounding error of the network itself another way may be off
NOISE = 0.5  # of the outputs' standard deviation: rounding that leaves nothing to compare


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far another way to run the network is from the plain one."""

    way: str
    difference: float
    """in standard deviations of the outputs"""
    tolerance: float
    """what rounding explains, in the same unit"""
    images: int
    changed: int | None
    """images of which the class, the largest output, is another; None: the outputs are no scores of classes"""
    finite: bool
    """whether its outputs are finite wherever those of the plain way are"""
    exact: bool = True
    """whether it computes with the same precision, so that any difference but rounding is a fault"""
    first_layer: str | None = None
    """the first normalisation layer whose input differs; None: not known"""

    @property
    def differs(self) -> bool:
        if not self.finite:
            return True
        return not self.difference <= self.tolerance and (self.exact or self.changed != 0)


def outputs(subject: Subject, batch: Batch, model: Callable[..., Any]) -> list[Tensor]:
    """The floating-point outputs of a model, float64 on the CPU; the one that scores the classes comes first."""
    output = subject.batches.call(model, batch)  # type: ignore[arg-type]
    first = logits(output)
    found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if first is not None and first.is_floating_point():
        found = [first, *(leaf for leaf in found if leaf is not first)]
    return [leaf.detach().to("cpu", torch.float64) for leaf in found]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of outputs, as the file's docstring says; infinite where they have other shapes."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return math.inf
    return max((_off(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)


def rounding_of(subject: Subject, batch: Batch, plain: list[Tensor]) -> float | None:
    """How far the plain outputs are from those in float64; None where the model does not run in it."""
    try:
        wide = copy_module(subject.network).double()
        return difference(plain, outputs(subject, as_type(batch, torch.float64), wide))
    except Exception:  # of any type: the model may ask for another type, or the device may lack this one
        return None


def compare(
    subject: Subject, batch: Batch, plain: list[Tensor], found: list[Tensor], way: str, tolerance: float | None = None
) -> Parity:
    """Compare outputs with the plain ones; without a tolerance, that of CLOSE or of the network's own rounding."""
    off = difference(found, plain)
    exact = tolerance is None
    if tolerance is None:
        tolerance = CLOSE
        if off > CLOSE:
            own = rounding_of(subject, batch, plain)
            tolerance = _CLOSE_UNKNOWN if own is None else within(own, CLOSE)
    return Parity(
        way=way,
        difference=off,
        tolerance=tolerance,
        images=len(batch),
        changed=_changed(found, plain),
        finite=off < math.inf,
        exact=exact,
    )


def within(own: float, floor: float) -> float:
    """The difference that a rounding error of the network itself explains; infinite if it is noise."""
    return math.inf if own > NOISE else max(floor, WORSE * own)


def as_type(batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch with its floating-point tensors in another type."""
    return mapped(batch, lambda value: value.to(dtype) if value.is_floating_point() else value)


def mapped(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with each of its tensors changed."""

    def one(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) else value

    kwargs: Mapping[str, Any] = tree_map(one, dict(batch.kwargs))
    return Batch(tree_map(one, batch.whole), tree_map(one, batch.args), kwargs, batch.labels)


def most_different(found: list[Tensor], plain: list[Tensor]) -> int:
    """The number of the image whose first output differs most."""
    if not plain or found[0].shape != plain[0].shape:
        return 0
    return int((found[0] - plain[0]).abs().nan_to_num(nan=math.inf).flatten(1).amax(1).argmax())


def layer_inputs(model: nn.Module, names: Mapping[str, Any], run: Callable[[], object]) -> dict[str, Tensor]:
    """The first input of each of the named layers in a forward, in the order of the calls; float64 on the CPU."""
    inputs: dict[str, Tensor] = {}
    hooks = []

    def note(name: str, args: Any, kwargs: Any) -> None:
        x = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        if x is not None and name not in inputs:
            inputs[name] = x.detach().to("cpu", torch.float64, copy=True)

    for name, module in model.named_modules():
        if name in names:
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: note(name, args, kwargs), with_kwargs=True
                )
            )
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def _off(found: Tensor, expected: Tensor) -> float:
    finite = expected.isfinite()
    same = (found == expected) | (found.isnan() & expected.isnan())
    if bool((~(finite & found.isfinite()) & ~same).any()):
        return math.inf
    a, b = found[finite], expected[finite]
    if not a.numel():
        return 0.0
    spread, largest = float(b.std(correction=0)), float(b.abs().max())
    scale = spread if spread > 1e-12 * largest else largest or 1.0  # constant outputs
    return float((a - b).abs().max()) / scale


def _changed(found: list[Tensor], plain: list[Tensor]) -> int | None:
    if not plain or plain[0].ndim != 2 or plain[0].shape[1] < 2:
        return None
    if not found or found[0].shape != plain[0].shape:
        return len(plain[0])
    return int((found[0].argmax(1) != plain[0].argmax(1)).sum())
