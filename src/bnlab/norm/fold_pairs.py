"""Which layers a batch normalisation layer can be folded into, or why into none."""

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from bnlab.norm.fold_trace import LAYERS, Region, plain
from bnlab.norm.layers import BatchNorm, is_plain
from bnlab.norm.models import hooked

_IDLE = (nn.Identity, nn.modules.dropout._DropoutNd)  # in evaluation
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


class CannotFold(Exception):  # noqa: N818  # no error, but a reason
    """Why a layer is not folded."""


def layers_before(norm: _BatchNorm, regions: list[Region], untraced: dict[nn.Module, str]) -> list[nn.Module]:
    """The layers whose outputs it normalises, in the order of their channels."""
    _check_norm(norm)
    region = next((region for region in regions if norm in set(region.module.modules())), None)
    if region is None:
        raise CannotFold(untraced[norm])
    if norm in region.shared:
        raise CannotFold(f"it is also held outside of {region.name}, in what cannot be traced")
    calls = [node for node in region.nodes() if region.called(node) is norm]
    if not calls:
        raise CannotFold("inference never reaches it")
    if region.reads(calls[0]):
        raise CannotFold("its parameters or statistics are also used elsewhere")
    found = [_sources(_input(call), region) for call in calls]
    layers = [[region.called(node) for node in nodes] for nodes in found]
    if any(others != layers[0] for others in layers):
        raise CannotFold("it is called after different layers")
    feeding = {node for nodes in found for node in nodes}
    for node, layer in zip(found[0], layers[0], strict=True):
        twice = layers[0].count(layer) > 1
        if twice or any(region.called(other) is layer and other not in feeding for other in region.nodes()):
            raise CannotFold(f"{region.describe(node)} before it is also called elsewhere")
    return [layer for layer in layers[0] if layer is not None]


def _check_norm(norm: _BatchNorm) -> None:
    if not is_plain(norm):
        raise CannotFold(f"{type(norm).__name__} has a forward of its own")
    kept = norm.running_mean is not None and norm.running_var is not None
    if isinstance(norm, BatchNorm):
        if norm.statistics == "population" and not int(norm.num_batches_tracked or 0):
            raise CannotFold("it has no population statistics for its present weights")
        if norm.example_weight:
            raise CannotFold("it mixes each example's own statistics into those it keeps (example_weight)")
        kept = kept and norm.num_batches_tracked is not None and norm.statistics != "batch"
    if norm.training or not kept:
        raise CannotFold("it normalises by the batch's own statistics")
    if is_parametrized(norm):
        raise CannotFold("its parameters are parametrised")
    if hooked(norm):
        raise CannotFold("a hook watches it")


def _check_layer(layer: nn.Module, node: fx.Node, region: Region) -> None:
    what = region.describe(node)
    if not plain(layer):
        raise CannotFold(f"{what} before it has a forward of its own")
    if is_parametrized(layer) or not {"weight", "bias"} <= layer._parameters.keys():
        raise CannotFold(f"the parameters of {what} before it are parametrised")
    if hooked(layer):
        raise CannotFold(f"a hook watches {what} before it")
    if region.reads(node):
        raise CannotFold(f"the parameters of {what} before it are also used elsewhere")
    if layer in region.shared:
        raise CannotFold(f"{what} before it is also held outside of {region.name}, in what cannot be traced")


def _sources(value: Any, region: Region) -> list[fx.Node]:
    """The calls of the layers whose outputs `value` is, in the order of their channels."""
    if not isinstance(value, fx.Node):
        raise CannotFold("before it stands a constant, not a convolution or linear layer")
    what = region.describe(value)
    module = region.called(value)
    if module is not None and isinstance(module, tuple(LAYERS)):
        _check_layer(module, value, region)
        found = [value]
    elif _does_nothing(value, module):
        found = _sources(_input(value), region)
    elif value.target in _CONCATENATIONS and isinstance(parts := _input(value, "tensors"), (list, tuple)):
        found = [node for part in parts for node in _sources(part, region)]
        dim = value.args[1] if len(value.args) > 1 else value.kwargs.get("dim", value.kwargs.get("axis", 0))
        if dim not in (1, 1 - dims_of(region.called(found[0]))):
            raise CannotFold(f"before it stands a concatenation along dimension {dim}, not along the channels")
    else:
        raise CannotFold(f"before it stands {what}, not a convolution or linear layer")
    if value in region.watched:
        raise CannotFold(f"a hook watches the output of {what} before it")
    if len(value.users) > 1 or value in region.stored:
        raise CannotFold(f"the output of {what} before it is also used elsewhere")
    return found


def _input(call: fx.Node, name: str = "input") -> Any:
    return call.args[0] if call.args else call.kwargs.get(name)


def _does_nothing(node: fx.Node, module: nn.Module | None) -> bool:
    if isinstance(module, _IDLE):
        return not module.training and "forward" not in vars(module)
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
    return node.target in _DROPOUTS and training is False


def dims_of(layer: nn.Module | None) -> int:
    """How many dimensions its outputs have."""
    return next(dims for kind, dims in LAYERS.items() if isinstance(layer, kind))
