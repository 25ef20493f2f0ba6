"""How large a network is, and how much it computes: parameters and multiply-adds, layer by layer."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from bnlab.errors import UsageError
from bnlab.nets import blocks
from bnlab.nets.network import TableNetwork

LARGEST = 2**16  # pixels to a side, far below where torch's count of a map's values would overflow

Shape = tuple[int, ...]
"""of what a layer gives for one image: (channels, height, width), or (units,) behind fully connected layers"""


@dataclass(frozen=True, kw_only=True)
class PartCount:
    """One convolution, normalisation or linear layer."""

    name: str
    """as in the state_dict, without `.weight`"""
    kind: str
    output: Shape
    parameters: int
    multiply_adds: int
    """for one image"""


@dataclass(frozen=True, kw_only=True)
class LayerCount:
    """One row of the network's table, an auxiliary head, the last pooling or the last layer."""

    name: str
    kind: str
    output: Shape
    parameters: int
    """all of them, trained or frozen"""
    multiply_adds: int
    """for one image: the sum over the parts"""
    parts: tuple[PartCount, ...]


def count(network: TableNetwork, size: int) -> list[LayerCount]:
    """The layers in the order of the forward pass, each auxiliary head behind the layer it sits on.

    A convolution has C' * H' * W' * C / groups * kernel area multiply-adds for one image, a linear layer as many as it
    has weights: what an output adds up. As is usual, nothing else is counted: biases, normalisation, pooling,
    activations. An auxiliary head is counted where the network has it, though it runs in training alone.

    The shapes are measured on a copy on torch's "meta" device, which computes nothing: the network is left as it is.

    Args:
        network: on any device, in any mode.
        size: height and width of the image in pixels.

    Raises:
        UsageError: the size is out of range, or too small for the network.
    """
    if not 1 <= size <= LARGEST:
        raise UsageError(f"size {size} cannot be", f"give a whole number of pixels, 1 to {LARGEST}")
    names = [name for row in network.order for name in (row, network.heads.get(row)) if name]
    names += ["fc"] if isinstance(network.pool, nn.Identity) else ["pool", "fc"]
    layers = {name: network.get_submodule(name) for name in names}
    parts = {name: dict(_parts(name, layer)) for name, layer in layers.items()}
    shapes = _measure(network, size, [*names, *(part for inside in parts.values() for part in inside)])
    heads = set(network.heads.values())

    def counted(name: str, part: nn.Module) -> PartCount:
        return PartCount(
            name=name,
            kind=_kind(part),
            output=shapes[name],
            parameters=_parameters(part),
            multiply_adds=_multiply_adds(part, shapes[name]),
        )

    def summed(name: str, layer: nn.Module) -> LayerCount:
        inside = tuple(counted(*item) for item in parts[name].items())
        return LayerCount(
            name=name,
            kind="auxiliary head" if name in heads else _kind(layer),
            output=shapes[name],
            parameters=_parameters(layer),
            multiply_adds=sum(part.multiply_adds for part in inside),
            parts=inside,
        )

    return [summed(*item) for item in layers.items()]


def _parts(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every convolution, normalisation and linear layer in a module (which may be one), by its full name."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        yield name, module
        return
    for child_name, child in module.named_children():
        if isinstance(module, blocks.ConvNormAct) and child is module.bn:  # whatever it is made of, one layer
            if not isinstance(child, nn.Identity):
                yield f"{name}.{child_name}", child
        else:
            yield from _parts(f"{name}.{child_name}", child)


def _measure(network: TableNetwork, size: int, names: list[str]) -> dict[str, Shape]:
    """What each of these modules gives for one image."""
    twin = copy.deepcopy(network).to("meta").eval()
    for module in twin.modules():
        # The hooks were copied too, and would tell their owner of images that there never were.
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        # A layer of one's own may look at values, which a meta tensor has not; in evaluation none changes a shape.
        if isinstance(module, blocks.ConvNormAct):
            module.bn = nn.Identity()
    shapes: dict[str, Shape] = {}

    def recorder(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def record(module: nn.Module, inputs: object, output: Tensor) -> None:
            shapes[name] = tuple(output.shape[1:])
            if name in twin.heads:
                twin.get_submodule(twin.heads[name])(output)  # evaluation would pass it by

        return record

    for name in names:
        twin.get_submodule(name).register_forward_hook(recorder(name))
    with torch.no_grad():
        twin(torch.zeros(1, twin.in_channels, size, size, dtype=twin.fc.weight.dtype, device="meta"))
    return shapes


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _multiply_adds(part: nn.Module, output: Shape) -> int:
    match part:
        case nn.Conv2d():
            return prod(output) * (part.in_channels // part.groups) * prod(part.kernel_size)
        case nn.Linear():
            return prod(output) * part.in_features
    return 0


def _kind(module: nn.Module) -> str:
    """What a layer is, in a few words."""
    match module:
        case nn.Conv2d():
            groups = f", {module.groups} groups" if module.groups > 1 else ""
            return _convolution(module) + groups
        case nn.Linear():
            return "linear"
        case blocks.ConvNormAct() if isinstance(module.layer, nn.Sequential):
            return f"separable {_convolution(module.layer[0])}"
        case blocks.ConvNormAct():
            return _kind(module.layer)
        case blocks.Inception():
            pool = module.branch4[0]
            return "inception" + (_stride(pool.stride) if isinstance(pool, blocks.Pool) else "")
        case nn.MaxPool2d():
            return f"{module.kernel_size}x{module.kernel_size} max pooling" + _stride(module.stride)
        case blocks.GlobalPool():
            return "mean of each map"
        case nn.LocalResponseNorm():
            return "local response normalisation"
        case blocks.Pixels():
            return f"{module.side}x{module.side} pixels as a vector"
    return type(module).__name__  # a normalisation layer


def _convolution(module: nn.Module) -> str:
    assert isinstance(module, nn.Conv2d)
    height, width = module.kernel_size
    return f"{height}x{width} convolution" + _stride(module.stride[0])


def _stride(stride: object) -> str:
    return "" if stride == 1 else f", stride {stride}"
