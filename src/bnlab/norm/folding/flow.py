"""Find in a graph which layers' outputs a batch normalisation normalises, and whether nothing else reads them.

Passed over are identities, what moves the channels as a whole (`flatten`, `transpose` and their kind), and pooling
that takes plain means. A concatenation along the channels has several layers before it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from bnlab.norm.folding.trace import FOLDABLE, Region, has_plain_forward
from bnlab.norm.model_utils import hooked

_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate, torch.ops.aten.cat.default)
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
_IDENTITIES = ("contiguous", "clone", "detach", "float", torch.clone, torch.detach)
# What reads of a tensor its shape or type, not its values: attributes, methods, and methods of another tensor.
_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "requires_grad", "layout", "is_cuda")
_METHODS = ("size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point",
            "get_device", "new_zeros", "new_ones", "new_empty", "new_full")  # fmt: skip
_OTHERS_METHODS = ("reshape_as", "view_as", "expand_as", "type_as")
_FUNCTIONS = (torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.numel)
_MOVES: dict[Any, str] = {
    **{name: name for name in ("flatten", "reshape", "view", "permute", "transpose")},
    **{getattr(torch, name): name for name in ("flatten", "reshape", "permute", "transpose")},
    **dict.fromkeys(("swapaxes", "swapdims", torch.swapaxes, torch.swapdims), "transpose"),
}


class CannotFold(Exception):  # noqa: N818  # not an error, but a reason
    """The reason why a layer is kept; `unseen` where it lies outside of the graph, so that another may show more."""

    def __init__(self, reason: str, *, unseen: bool = False) -> None:
        super().__init__(reason)
        self.unseen = unseen


class Source(NamedTuple):
    """Calls of layers whose outputs, one after the other along the channels, are one value."""

    calls: list[fx.Node]
    axis: int
    """the dimension of the channels: 1, or -1 of a linear layer"""
    dims: int | None
    """how many dimensions the value has, if only with this number its channels are where `axis` says"""


def sources(value: Any, region: Region) -> Source:
    """Return the calls of the layers whose outputs make up `value`."""
    if not isinstance(value, fx.Node):
        raise CannotFold("a constant comes before it, not a convolution or linear layer")
    what = region.describe(value)
    module = region.called(value)
    if module is not None and isinstance(module, tuple(FOLDABLE)):
        check_layer(module, value, region, "before")
        found = Source([value], *((-1, None) if isinstance(module, nn.Linear) else (1, _output_dims(module))))
    elif is_identity(value, module):
        found = sources(input_of(value), region)
    elif value.target in _CONCATENATIONS and isinstance(parts := input_of(value, "tensors"), (list, tuple)):
        each = [sources(part, region) for part in parts]
        found = Source([node for one in each for node in one.calls], *each[0][1:])
        dim = value.args[1] if len(value.args) > 1 else value.kwargs.get("dim", value.kwargs.get("axis", 0))
        alike = {(axis % (dims or 2), dims or 2) for _, axis, dims in each}  # of a linear layer: of N x C
        if len(alike) > 1:
            raise CannotFold("a concatenation of different shapes comes before it")
        if dim not in (1, 1 - (found.dims or 2)):
            raise CannotFold(f"a concatenation along dimension {dim}, not along the channels, comes before it")
        if found.axis == -1:
            found = Source(found.calls, 1, 2)
    elif _is_mean(module):
        found = sources(input_of(value), region)
        if found.axis != 1:
            raise CannotFold(f"{what} comes before it, not a convolution or linear layer")
    elif isinstance(inner := input_of(value), fx.Node) and (move := _move(value)):
        source = sources(inner, region)
        width = getattr(region.called(source.calls[0]), "out_features", None) if len(source.calls) == 1 else None
        moved = move(source, width)
        if moved is None:
            raise CannotFold(f"{what} comes before it, not a convolution or linear layer")
        found = moved
    else:
        reason = f"{what} comes before it, not a convolution or linear layer"
        raise CannotFold(reason, unseen=value.op == "placeholder" and bool(region.names[region.module]))
    check_single_use(value, region)
    return found


def check_single_use(value: fx.Node, region: Region) -> None:
    """Raise unless one node alone reads the value."""
    what = region.describe(value)
    if value in region.hooked_nodes:
        raise CannotFold(f"a hook reads the output of {what} before it")
    if len(readers(value)) > 1 or value in region.stored:
        raise CannotFold(f"the output of {what} before it is also used elsewhere")


def check_layer(layer: nn.Module, node: fx.Node, region: Region, where: str) -> None:
    """Raise unless the layer's weight and bias can be changed; `where` it is: "before" or "after" the norm."""
    what = region.describe(node)
    if is_parametrized(layer) or not {"weight", "bias"} <= layer._parameters.keys():
        raise CannotFold(f"the parameters of {what} {where} it are parametrised")
    if hooked(layer):
        raise CannotFold(f"a hook is registered on {what} {where} it")
    if region.reads(node):
        raise CannotFold(f"the parameters of {what} {where} it are also used elsewhere")
    if layer in region.shared:
        reason = f"{what} {where} it is also used outside of {region.name}, in a part that cannot be traced"
        raise CannotFold(reason, unseen=True)


def readers(value: fx.Node) -> list[fx.Node]:
    """Return the nodes that read the value itself, not merely its shape or type."""
    return [user for user in value.users if not _reads_shape(user, value)]


def _reads_shape(user: fx.Node, value: fx.Node) -> bool:
    first, others = user.args[:1], [*user.args[1:], *user.kwargs.values()]
    if value in others:  # as the first argument too, or within a list, it counts as read
        return user.target in _OTHERS_METHODS and user.args[1:] == (value,) and value not in first
    if first != (value,):
        return False
    if user.target is getattr:
        return user.args[1] in _ATTRIBUTES
    return user.target in _METHODS if user.op == "call_method" else user.target in _FUNCTIONS


def input_of(call: fx.Node, name: str = "input") -> Any:
    return call.args[0] if call.args else call.kwargs.get(name)


def is_identity(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether in evaluation the node returns its input."""
    if isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd)):
        return not module.training and "forward" not in vars(module)
    if node.target in _IDENTITIES:
        return len(node.args) == 1 and node.op != "call_module"
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
    return node.target in _DROPOUTS and training is False


def _is_mean(module: Any) -> bool:
    """Whether it takes plain means over positions, which a scale and shift of each channel may precede or follow."""
    if type(module) in (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d):
        padded = module.padding not in (0, (0,), (0, 0), (0, 0, 0)) and module.count_include_pad
        return not padded and getattr(module, "divisor_override", None) is None
    return type(module) in (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


def _output_dims(layer: nn.Module) -> int:
    return next(dims for kind, dims in FOLDABLE.items() if isinstance(layer, kind))


def _move(node: fx.Node) -> Callable[[Source, int | None], Source | None] | None:
    """Return what the node does to the place of the channels: a function that returns None where it splits them."""
    kind = _MOVES.get(node.target)
    if kind is None or node.op not in ("call_method", "call_function"):
        return None
    args: tuple[Any, ...] = (*node.args[1:], *node.kwargs.values())
    if kind in ("reshape", "view", "permute") and len(args) == 1 and isinstance(args[0], (tuple, list)):
        args = tuple(args[0])
    if kind == "flatten":
        start = node.kwargs.get("start_dim", node.args[1] if len(node.args) > 1 else 0)
        args = (start, node.kwargs.get("end_dim", node.args[2] if len(node.args) > 2 else -1))
    if not all(isinstance(arg, int) for arg in args):
        return None

    def move(source: Source, width: int | None) -> Source | None:
        calls, axis, dims = source
        last = axis == -1 and dims is None
        if kind == "flatten" and last:
            return Source(calls, 1, 2) if args in ((0, 1), (0, -2)) else None  # (0, 1) of three dimensions
        if kind == "flatten" and dims is not None:
            start, end = (arg % dims for arg in args)
            return Source(calls, 1, dims - (end - start)) if 1 < start <= end else None
        if kind in ("reshape", "view") and last:
            return Source(calls, 1, 2) if args == (-1, width) else None
        if kind == "transpose" and last:
            return Source(calls, 1, 3) if set(args) in ({1, 2}, {-1, -2}) else None
        if kind == "permute" and last:
            return Source(calls, 1, len(args)) if len(args) > 2 and args[1] in (-1, len(args) - 1) else None
        return None

    return move


# What follows a batch normalisation.


def layer_after(call: fx.Node, region: Region) -> fx.Node:
    """Return the call of the layer that alone reads the output of `call`, and takes its scale and shift exactly.

    It then reads the input of `call` instead, which nothing may change in place before that.
    """
    value = call
    while True:
        after = readers(value)
        if len(after) != 1 or value in region.stored or value in region.hooked_nodes:
            raise CannotFold("several parts read its output")
        user = after[0]
        module = region.called(user)
        if not is_identity(user, module):
            break
        value = user
    one_input = user.args == (value,) and not user.kwargs
    unpadded = isinstance(module, nn.Linear) or (
        isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and (module.padding_mode != "zeros" or module.padding == "valid" or not any(_numbers(module.padding)))
    )
    if module is None or not unpadded or not one_input:
        raise CannotFold("no unpadded convolution or linear layer follows it")
    check_layer(module, user, region, "after")
    between = call.next
    while between is not user:  # `x += 1` is traced as an addition
        layer = region.called(between)
        harmless = between.op in ("get_attr", "placeholder") or is_identity(between, layer)
        if not (harmless or (layer is not None and has_plain_forward(layer) and not hooked(layer))):
            raise CannotFold(f"{region.describe(between)} runs between it and the layer after it")
        between = between.next
    return user


def _numbers(padding: Any) -> tuple[Any, ...]:
    return (padding,) if isinstance(padding, (int, str)) else tuple(padding)
