"""Freeze normalisation layers, torch.nn's and bnlab's, so that a later `train()` does not undo it.

A frozen layer normalises by its stored statistics in training too and does not move them. torch.nn's layers and
their subclasses have no such state. While one is frozen, its class is a new subclass, made here, with the same
name, which keeps the layer in evaluation. The layer itself, its tensors and its hooks remain the same objects.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized

from bnlab.norm.model_utils import copy_module, example_inputs, layer_name, make_class, unwrap


class Freezable(nn.Module):
    """Base of the layers that can be frozen. Pickle and copies keep the state; `state_dict` is torch.nn's, without."""

    frozen: bool = False
    _requested_mode: bool = True  # of a frozen layer, by the last train() or eval()
    _stopped_parameters: tuple[str, ...] = ()  # names of those whose training freeze() stopped

    def freeze(self, *, affine: bool = True) -> Self:
        """Normalise by the stored statistics from now on, in training too, and stop moving them.

        Unlike `eval()` this survives a later `train()`. With `affine`, gamma and beta are no longer trained either
        (until a later `requires_grad_(True)` on the model). Submodules keep their mode.

        Raises:
            ValueError: the layer keeps no statistics to freeze.
        """
        if not _keeps_statistics(self):
            raise ValueError(f"{layer_name(self)} keeps no running statistics to freeze: use track_running_stats=True")
        if affine:
            for name, parameter in self.named_parameters(recurse=False):
                if parameter.requires_grad:
                    self._stopped_parameters = (*self._stopped_parameters, name)
                    parameter.requires_grad_(False)
        if not self.frozen:
            self._requested_mode, self.frozen = self.training, True
        self.training = False
        return self

    def unfreeze(self) -> Self:
        """Undo `freeze`: the layer has the mode that it would have without it, and trains what it trained before."""
        if self.frozen:
            for name in self._stopped_parameters:
                getattr(self, name).requires_grad_(True)
            mode = self._requested_mode
            del self.frozen, self._requested_mode
            vars(self).pop("_stopped_parameters", None)
            self.training = mode
        return self

    def train(self, mode: bool = True) -> Self:
        """Set the mode as torch.nn does, but a frozen layer stays in evaluation."""
        super().train(mode)
        if self.frozen:
            self._requested_mode, self.training = mode, False
        return self


class _Frozen(Freezable):
    """Mixed into the class of a layer of torch.nn's while it is frozen."""

    def unfreeze(self) -> Self:
        if self.frozen:
            super().unfreeze()
            self.__class__ = own_class(self)  # type: ignore[assignment]
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training":  # set by hand
            value = value and not self.frozen
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return ", ".join([*filter(None, [super().extra_repr()]), "frozen"])


def _frozen_class(kind: type[nn.Module]) -> type[nn.Module]:
    return make_class(kind.__name__, (_Frozen, kind), kind, (_frozen_class, kind))


def own_class(layer: nn.Module) -> type[nn.Module]:
    """Return the layer's class; of a frozen layer of torch.nn's the one that it has otherwise."""
    kind = type(layer)
    return kind.__bases__[1] if _Frozen in kind.__bases__ else kind


def set_class(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Give the layer another class; a frozen layer stays frozen."""
    frozen = isinstance(layer, Freezable) and layer.frozen
    layer.__class__ = _frozen_class(kind) if frozen and not issubclass(kind, Freezable) else kind


@dataclass(frozen=True)
class Freezing:
    frozen: tuple[str, ...]
    """the layers that are frozen now"""
    kept: dict[str, str]
    """the layers with statistics, and the normalisation layers without, that are not frozen, each with the reason"""


def freeze(model: nn.Module, *, affine: bool = True) -> Freezing:
    """Freeze every normalisation layer of a model that keeps statistics, in place.

    These are torch.nn's BatchNorm1d, 2d, 3d, SyncBatchNorm and InstanceNorm with `track_running_stats=True`, their
    subclasses, and bnlab's layers. They normalise by the stored statistics in training too, and do not move them; a
    later `train()` does not change that. With `affine`, their gamma and beta are no longer trained either.
    Parameters of layers within a layer, such as those of its activation, are not touched. The state is a part of the
    layers, which pickle and copies keep, but not of `state_dict`, which is torch.nn's.

    Raises:
        ValueError: the model has lazy layers or is scripted; or it is within a DistributedDataParallel, which waits
            for the gradients of parameters that are no longer trained.
    """
    network = unwrap(model)
    if affine and any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "DistributedDataParallel waits for the gradients of gamma and beta: freeze the model before it is wrapped, "
            "or pass affine=False"
        )
    frozen: list[str] = []
    kept: dict[str, str] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, Freezable | _BatchNorm | _InstanceNorm) or "running_mean" in layer._buffers:
            reason = _why_not(layer)
            if reason is None:
                if not isinstance(layer, Freezable):
                    layer.__class__ = _frozen_class(type(layer))
                assert isinstance(layer, Freezable)
                layer.freeze(affine=affine)
                frozen.append(name)
            else:
                kept[name] = reason
    return Freezing(tuple(frozen), kept)


def unfreeze(model: nn.Module) -> tuple[str, ...]:
    """Undo `freeze` and the layers' own `freeze()`, exactly, in place; return the names of the layers.

    Each layer has the mode that it would have without, and trains those of its parameters that it trained before.
    """
    names = []
    for name, layer in unwrap(model).named_modules():
        if isinstance(layer, Freezable) and layer.frozen:
            layer.unfreeze()
            names.append(name)
    return tuple(names)


def _keeps_statistics(layer: nn.Module) -> bool:
    return bool(getattr(layer, "track_running_stats", False)) and getattr(layer, "running_mean", None) is not None


def _why_not(layer: nn.Module) -> str | None:
    """Return the reason why a layer cannot be frozen, or None."""
    if not isinstance(layer, Freezable | _BatchNorm | _InstanceNorm):
        return f"{type(layer).__name__} keeps statistics, but is not a subclass of torch.nn's or bnlab's layers"
    if not _keeps_statistics(layer):
        return "it keeps no running statistics"
    if is_parametrized(layer):
        return "its parameters are parametrised"
    if not isinstance(layer, Freezable) and _uses_batch_in_evaluation(layer):
        return f"the forward of {type(layer).__name__} normalises by the batch, or moves statistics, in evaluation too"
    return None


@torch.no_grad()
def _uses_batch_in_evaluation(layer: nn.Module) -> bool:
    """Whether a forward that is not torch.nn's shows this on an example."""
    known: tuple[Callable[..., Any], ...] = _BatchNorm.forward, nn.SyncBatchNorm.forward, _InstanceNorm.forward
    if type(layer).forward in known or "forward" in vars(layer):
        return False
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    for x in example_inputs(layer):
        try:
            copied = copy_module(layer).eval()
            with torch.random.fork_rng(devices=[]):
                whole, part = copied.forward(x), copied.forward(x[:2])  # without hooks
        except Exception:  # of any type: it is not our code, and another number of dimensions may do
            continue
        if not isinstance(whole, Tensor) or whole.is_meta:
            return False
        moved = any(not torch.equal(buffer, before[name]) for name, buffer in copied.named_buffers())
        return moved or not torch.allclose(whole[:2], part, rtol=1e-3, atol=1e-3)
    return False
