"""Sees which modules are in training mode where the caller evaluates, and whether outputs depend on it.

An output in evaluation is a function of its image alone: it is the same in a batch, by itself and the second time. Both
are tried on a few images in the modes in which the caller passed the model, in float64 on a copy, so that rounding
cannot be the reason of a difference.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bnlab.health.batches import Batch, logits
from bnlab.health.evidence import Evidence
from bnlab.health.restore import restored
from bnlab.health.subject import Subject
from bnlab.norm.model_utils import copy_module
from bnlab.norm.recalibrate import evaluation_mode

IMAGES = 4
LIMITS = {torch.float64: 1e-5, torch.float32: 1e-3}
"""a difference of outputs that rounding does not explain, in standard deviations of the outputs"""
_RANDOM = ("p", "drop_prob", "drop_path", "dropout", "dropout_p", "drop")  # attributes by which modules drop values
_RECURRENT = (nn.RNNBase, nn.MultiheadAttention)


@dataclass(frozen=True, kw_only=True)
class Modes:
    """The modules that were in training mode when the caller passed the model."""

    random: tuple[str, ...]
    """those that drop values, such as dropout, by name with their class"""
    trained: bool
    """whether any parameter of the model is trained"""


@dataclass(frozen=True, kw_only=True)
class Alone:
    """What outputs depend on beside the image; differences are in standard deviations of the outputs."""

    images: int
    dtype: str
    limit: float
    """rounding explains what is less"""
    alone: float | None
    """the largest difference of outputs of an image in a batch and by itself; None: not measured"""
    again: float
    """the largest difference of outputs of two runs of the same batch"""
    again_in_evaluation: float
    """the same with every module in evaluation"""

    @property
    def depends_on_batch(self) -> bool:
        return self.alone is not None and self.alone > self.limit

    @property
    def is_random(self) -> bool:
        return self.again > self.limit


@dataclass(frozen=True, kw_only=True)
class TrainMode:
    """What `model.train()` does to layers that were in evaluation while the model was in training."""

    held: tuple[str, ...]
    """the layers that were so"""
    undone: tuple[str, ...]
    """those of them that are in training after it"""


@dataclass(frozen=True, kw_only=True)
class Moved:
    """How far the buffers of a layer moved."""

    batches: int
    """by how much num_batches_tracked rose"""
    mean: float
    """the largest change of a running mean, in standard deviations by the running variance before"""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What happened while the caller's validation ran."""

    ran: bool
    """whether a module of the model was called"""
    training: tuple[str, ...]
    """the layers that keep statistics, and were called in training mode"""
    random: tuple[str, ...]
    """the modules that drop values, and were called in training mode, by name with their class"""
    moved: Mapping[str, Moved]
    """the layers whose statistics it changed, by name"""


def gather(subject: Subject, evidence: Evidence) -> dict[str, Any]:
    """Measure "modes", "alone" and, if the caller gave what they take, "train_mode" and "validation".

    Raises:
        Exception: whatever the caller's `validate` raises.
    """
    network, found = subject.network, dict[str, Any]()
    if isinstance(network, torch.jit.ScriptModule):
        return found
    modules = dict(network.named_modules())
    random = tuple(_with_class(name, m) for name, m in modules.items() if subject.modes.get(name) and drops(m))
    found["modes"] = Modes(random=random, trained=any(p.requires_grad for p in network.parameters()))
    with subject.noting("whether outputs depend on the batch could not be measured"):
        waits = subject.waits_for_others and any(subject.modes[name] for name in subject.layers)
        found["alone"] = None if evidence.root_training or waits else run_alone(subject)
        found["train_mode"] = set_to_training(subject) if evidence.root_training else None
    if subject.given.validate is not None:
        found["validation"] = run_validation(subject, subject.given.validate)
    return found


def drops(module: nn.Module) -> bool:
    """Whether a module is one that drops values at random in training: dropout, stochastic depth, and the like."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    values = [getattr(module, name, None) for name in _RANDOM]
    plain = type(module).__module__.startswith("torch.nn") and not isinstance(module, _RECURRENT)
    return not plain and any(isinstance(v, float) and 0 < v <= 1 for v in values)


def _with_class(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


@torch.no_grad()
def run_alone(subject: Subject) -> Alone | None:
    """Run a few images in a batch, twice, and one by one; None if outputs do not show which image they belong to."""
    sample = subject.batches.sample(IMAGES)
    try:
        copied = copy_module(subject.network).double()
        return _run_alone(subject, copied, _to_double(sample))
    except Exception:  # of any type: not every model can be copied, or runs in float64
        return _run_alone(subject, subject.network, sample)


def _to_double(batch: Batch) -> Batch:
    def convert(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    whole, args, kwargs = (tree_map(convert, part) for part in (batch.whole, batch.args, dict(batch.kwargs)))
    return Batch(whole, args, kwargs, batch.labels)


def _run_alone(subject: Subject, model: nn.Module, sample: Batch) -> Alone | None:
    def run(batch: Batch) -> Tensor | None:
        output = logits(subject.call(batch, model))
        fits = output is not None and output.ndim > 0 and len(output) == len(batch)
        return output.detach().clone() if output is not None and fits and output.is_floating_point() else None

    def difference(one: Tensor, other: Tensor) -> float:
        size = float((one - other).abs().max())
        return 0.0 if math.isnan(size) else size / scale  # NaN: other checks report it

    with restored(model):
        first, second = run(sample), run(sample)
        if first is None or second is None or not first.numel() or first.dtype not in LIMITS:
            return None
        spread = float(first.std()) if first.numel() > 1 else 0.0
        scale = max(spread, 1e-6 * float(first.abs().max()), 1e-300)
        with evaluation_mode(model):
            evaluated = run(sample), run(sample)
        parts = _run_parts(run, sample)
    assert evaluated[0] is not None and evaluated[1] is not None
    return Alone(
        images=len(sample),
        dtype=str(first.dtype).removeprefix("torch."),
        limit=LIMITS[first.dtype],
        alone=None if parts is None or parts.shape != first.shape else difference(first, parts),
        again=difference(first, second),
        again_in_evaluation=difference(*evaluated),  # type: ignore[arg-type]
    )


def _run_parts(run: Callable[[Batch], Tensor | None], sample: Batch) -> Tensor | None:
    """The outputs of the images one by one or, if that fails, in pairs."""
    for size in (1, 2):
        if len(sample) <= size:
            return None
        try:
            parts = [run(sample.first(size, start)) for start in range(0, len(sample), size)]
        except Exception:  # of any type; torch refuses to take the variance of one value, for example
            continue
        return None if any(part is None for part in parts) else torch.cat([p for p in parts if p is not None])
    return None


def set_to_training(subject: Subject) -> TrainMode:
    """Call `train()` on a model that was passed in training mode."""
    held = tuple(name for name in subject.layers if not subject.modes[name])
    with restored(subject.network, parameters=True):  # a train() of the caller's own may do more than to set modes
        subject.network.train()
        undone = tuple(name for name in held if subject.layers[name].training)
    return TrainMode(held=held, undone=undone)


def run_validation(subject: Subject, validate: Callable[[nn.Module], object]) -> Validation:
    """Run the caller's validation, and undo what it changes."""
    called: dict[str, bool] = {}  # whether in training mode, by the name of the module
    layers = subject.layers
    before = {name: statistics_of(layer) for name, layer in layers.items()}
    with restored(subject.model, optimizer=subject.given.optimizer, parameters=True):
        with _noting_modes(subject.network, called):
            validate(subject.passed)
        after = {name: statistics_of(layer) for name, layer in layers.items()}
    modules = dict(subject.network.named_modules())
    training = [name for name, mode in called.items() if mode]
    return Validation(
        ran=bool(called),
        training=tuple(name for name in training if name in layers),
        random=tuple(_with_class(name, modules[name]) for name in training if drops(modules[name])),
        moved={name: _moved(before[name], after[name]) for name in layers if differ(before[name], after[name])},
    )


@contextmanager
def _noting_modes(network: nn.Module, called: dict[str, bool]) -> Iterator[None]:
    def note(name: str, module: nn.Module) -> None:
        called[name] = called.get(name, False) or module.training

    with ExitStack() as stack:
        for name, module in network.named_modules():
            handle = module.register_forward_pre_hook(lambda m, _, name=name: note(name, m))
            stack.callback(handle.remove)
        yield


def statistics_of(layer: nn.Module) -> dict[str, Tensor]:
    """Copies of the statistics that a layer keeps."""
    names = ("num_batches_tracked", *(name for name in layer._buffers if name.startswith("running_")))
    held = {name: layer._buffers.get(name) for name in names}
    return {name: value.detach().clone() for name, value in held.items() if value is not None}


def differ(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether statistics differ in any value; NaN equals NaN."""
    if one.keys() != other.keys():
        return True
    return any(v.shape != other[k].shape or not _same(v, other[k]) for k, v in one.items())


def _same(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Moved:
    counts = [int(s["num_batches_tracked"]) if "num_batches_tracked" in s else 0 for s in (before, after)]
    mean, variance = before.get("running_mean"), before.get("running_var")
    change = 0.0
    if mean is not None and "running_mean" in after and after["running_mean"].shape == mean.shape:
        std = torch.ones_like(mean) if variance is None else (variance + 1e-5).sqrt()
        change = float(((after["running_mean"] - mean).abs() / std).nan_to_num(0).max())
    return Moved(batches=counts[1] - counts[0], mean=change)
