"""Turn a model's batch normalisation layers into bnlab's, or into synchronised ones, and back, in place.

A layer remains the same object, with its parameters, buffers, hooks, mode and `state_dict`; only its class changes. A
subclass of torch.nn's layers stays an instance of itself: its new class derives from it and from bnlab's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized

from bnlab.norm import own_forward
from bnlab.norm.freeze import own_class, set_class
from bnlab.norm.ghost import GhostBatchNorm
from bnlab.norm.layers import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, StatisticsMode, is_plain_class
from bnlab.norm.model_utils import class_from, make_class, recipe_of, unwrap
from bnlab.norm.sync import Group, SyncBatchNorm

_OURS: dict[type[_BatchNorm], type[BatchNorm]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}
_BEFORE_CONVERT, _BEFORE_SYNC = "_before_convert", "_before_sync"  # attributes with the recipe of the class before


@dataclass(frozen=True)
class Conversion:
    model: nn.Module
    """the model that was passed, whose layers were changed in place"""
    converted: tuple[str, ...]
    """the layers that are as they should be now, including those that were so before"""
    kept: dict[str, str]
    """the layers that are not, each with the reason"""


class CannotConvert(Exception):  # noqa: N818  # not an error, but a reason
    """The reason why a layer is kept."""


class BatchNormAnyDims(_BatchNorm):
    """torch.nn's batch normalisation of N x C x ..., with any number of positions.

    `revert_sync` makes it of an nn.SyncBatchNorm, which does not show how many dimensions it had before.
    """

    forward = _BatchNorm.forward

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2D input (got {input.ndim}D input)")


def convert(model: nn.Module) -> Conversion:
    """Turn every batch normalisation layer of torch.nn's into bnlab's, in place; the results are the same.

    What bnlab's layers do in addition, they do from now on: a batch that is not finite does not move the statistics,
    nor does a forward that `torch.utils.checkpoint` runs again, errors name the layer, and so on.

    Subclasses are converted as well. One that overrides forward keeps what it does before and after normalising,
    provided that it calls batch_norm, or the base class's forward, once, and does not use its statistics otherwise.

    Raises:
        TypeError: the argument is not a module.
        ValueError: the model has lazy layers, or is scripted.
    """
    return _change(model, _to_ours)


def revert(model: nn.Module) -> Conversion:
    """Undo `convert`. A layer that was made as bnlab's stays so, as does one that `convert_sync` converted."""
    return _change(model, _to_torchs)


def convert_sync(model: nn.Module, process_group: Group = None) -> Conversion:
    """Turn every batch normalisation layer, torch.nn's and bnlab's, into a `SyncBatchNorm`, in place.

    Subclasses are converted where `convert` would. Ghost batch normalisation and whitening are not synchronised. Layers
    remain the same objects, so that an optimiser still holds their parameters. Convert before wrapping the model in
    DistributedDataParallel.

    Args:
        model: in any mode, with or without frozen layers.
        process_group: the processes to synchronise with (default: those of a layer that has some, else all).

    Raises:
        TypeError: the argument is not a module.
        ValueError: the model has lazy layers, or is scripted.
    """
    return _change(model, partial(_to_sync, group=process_group))


def revert_sync(model: nn.Module) -> Conversion:
    """Undo `convert_sync`; and turn nn.SyncBatchNorm, whose kind before is not known, into a layer of any dimensions.

    A layer that was made as bnlab's SyncBatchNorm, rather than converted, stays one: it runs in one process too.
    """
    return _change(model, _from_sync)


def _change(model: nn.Module, change: Callable[[nn.Module], bool]) -> Conversion:
    """Change each layer; the function returns whether the layer is as it should be, or raises CannotConvert."""
    converted: list[str] = []
    kept: dict[str, str] = {}
    for name, layer in unwrap(model).named_modules():
        try:
            converted += [name] * change(layer)
        except CannotConvert as reason:
            kept[name] = str(reason)
    return Conversion(model, tuple(converted), kept)


def _to_ours(layer: nn.Module) -> bool:
    if isinstance(layer, StatisticsMode):
        return isinstance(layer, BatchNorm)
    if not _is_batch_norm(layer):
        return False
    kind = own_class(layer)
    target = next((ours for theirs, ours in _OURS.items() if issubclass(kind, theirs)), BatchNorm)
    _convert(layer, target, {_BEFORE_CONVERT: recipe_of(kind)})
    return True


def _to_torchs(layer: nn.Module) -> bool:
    if not isinstance(layer, BatchNorm):
        return False
    if _BEFORE_SYNC in vars(layer):
        raise CannotConvert("convert_sync has converted it: call revert_sync first")
    if _BEFORE_CONVERT not in vars(layer):
        raise CannotConvert("it was made as bnlab's layer, not converted")
    if layer.statistics != "running" or layer.example_weight:
        raise CannotConvert("torch.nn's layers normalise by running statistics alone in inference")
    kind = class_from(vars(layer).pop(_BEFORE_CONVERT))
    for name in ("_statistics", "example_weight"):
        vars(layer).pop(name, None)
    set_class(layer, kind)
    return True


def _to_sync(layer: nn.Module, group: Group) -> bool:
    if isinstance(layer, SyncBatchNorm):
        layer.process_group = group or layer.process_group
        return True
    if isinstance(layer, StatisticsMode) and (isinstance(layer, GhostBatchNorm) or not isinstance(layer, BatchNorm)):
        raise CannotConvert(f"{type(layer).__name__} cannot be synchronised")
    if not _is_batch_norm(layer):
        return False
    before = {name: value for name, value in vars(layer).items() if name == "process_group"}
    group = group or before.get("process_group")
    _convert(layer, SyncBatchNorm, {_BEFORE_SYNC: (recipe_of(own_class(layer)), before), "process_group": group})
    return True


def _from_sync(layer: nn.Module) -> bool:
    if isinstance(layer, SyncBatchNorm):
        if _BEFORE_SYNC not in vars(layer):
            raise CannotConvert("it was made as a SyncBatchNorm, not converted")
        recipe, before = vars(layer).pop(_BEFORE_SYNC)
        del layer.process_group
        vars(layer).update(before)
        set_class(layer, class_from(recipe))
        return True
    kind = own_class(layer)
    if not isinstance(layer, nn.SyncBatchNorm) or issubclass(kind, BatchNormAnyDims):
        return False
    vars(layer).pop("process_group", None)
    set_class(layer, BatchNormAnyDims if kind is nn.SyncBatchNorm else derived_class(kind, BatchNormAnyDims))
    return True


def _is_batch_norm(layer: nn.Module) -> bool:
    if not isinstance(layer, _BatchNorm) and "running_mean" in layer._buffers and not isinstance(layer, _InstanceNorm):
        raise CannotConvert(f"{type(layer).__name__} keeps statistics, but is not a subclass of torch.nn's layers")
    return isinstance(layer, _BatchNorm)


def _convert(layer: nn.Module, target: type[BatchNorm], attributes: dict[str, Any]) -> None:
    kind = own_class(layer)
    if "forward" in vars(layer):
        raise CannotConvert("its forward was replaced")
    if is_parametrized(layer):
        raise CannotConvert("its parameters are parametrised")
    try:
        new = derived_class(kind, target)
        reason = None if is_plain_class(kind) else own_forward.why_not(layer, derived_class(kind, own_forward.Probe))
        if reason is None:
            set_class(layer, new)
    except TypeError as error:  # Python's rules of inheritance
        reason = f"its class cannot be changed: {error}"
    if reason is not None:
        raise CannotConvert(reason)
    vars(layer).update(attributes)


def derived_class(kind: type[nn.Module], target: type[nn.Module]) -> type[nn.Module]:
    """Return a class that derives from `kind`, but whose normalisation, `super().forward` of `kind`, is `target`'s."""
    if kind in _OURS or kind in _OURS.values():
        return target
    made_by = vars(kind).get("made_by", ())
    if made_by[:1] == (derived_class,):  # it has been converted before
        kind = made_by[1]
    over: type[nn.Module] = target
    if issubclass(kind, nn.SyncBatchNorm):  # it has a forward too, which has to come later
        over = type(target.__name__, (target, nn.SyncBatchNorm), {})
    own = issubclass(target, BatchNorm) and not is_plain_class(kind)
    bases = (own_forward.OwnForward, kind, over) if own else (kind, over)
    renamed = issubclass(target, SyncBatchNorm) and not issubclass(kind, nn.SyncBatchNorm)
    return make_class("Sync" * renamed + kind.__name__, bases, kind, (derived_class, kind, target))
