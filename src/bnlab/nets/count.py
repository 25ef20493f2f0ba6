"""How large a network is, and how much it computes: parameters and multiply-adds, layer by layer.

torch's FlopCounterMode counts the operations. It knows neither the kinds of layers nor the shapes of their outputs.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bnlab.errors import UsageError
from bnlab.nets import blocks
from bnlab.nets.network import TableNetwork

LARGEST = 2**16  # pixels, far below where torch's count of a map's values would overflow

Shape = tuple[int, ...]
"""Of a layer's output for one image: (channels, height, width), or (units,) after fully connected layers."""


@dataclass(frozen=True, kw_only=True)
class PartCount:
    """One convolution, normalisation or linear layer."""

    name: str
    """As in the state_dict, without `.weight`."""
    kind: str
    output: Shape
    parameters: int
    """Trained or frozen."""
    multiply_adds: int
    """For one image."""


@dataclass(frozen=True, kw_only=True)
class LayerCount(PartCount):
    """One row of the network's table, an auxiliary head, the last pooling or the last layer: the sum of its parts."""

    parts: tuple[PartCount, ...]


def count(network: TableNetwork, size: int) -> list[LayerCount]:
    """The layers in the order of the forward pass, each auxiliary head after the layer whose output it takes.

    Multiply-adds are those of convolutions (C' * H' * W' * C / groups * kernel area for one image) and linear layers
    (as many as weights): half of what FlopCounterMode counts as flops. As is usual, biases, normalisation, pooling and
    activations are not counted. An auxiliary head is counted if the network has it, though it runs in training only.

    A copy on torch's "meta" device is counted, where nothing is computed; the network itself is not changed.

    Args:
        network: on any device, in any mode.
        size: height and width of the image in pixels.

    Raises:
        UsageError: the size is out of range, or too small for the network.
    """
    if not 1 <= size <= LARGEST:
        raise UsageError(f"size {size} is not valid", f"use a whole number of pixels, 1 to {LARGEST}")
    shapes, flops = _run_on_meta(network, size)
    names = [name for row in network.order for name in (row, network.heads.get(row)) if name]
    names += ["fc"] if isinstance(network.pool, nn.Identity) else ["pool", "fc"]
    counts = []
    for name in names:
        layer = network.get_submodule(name)
        parts = tuple(
            PartCount(
                name=part_name,
                kind=_kind(part),
                output=shapes[part_name],
                parameters=_parameters(part),
                multiply_adds=flops.get(part_name, 0) // 2,
            )
            for part_name, part in _parts(name, layer)
        )
        counts.append(
            LayerCount(
                name=name,
                kind="auxiliary head" if name in network.heads.values() else _kind(layer),
                output=shapes[name],
                parameters=_parameters(layer),
                multiply_adds=sum(part.multiply_adds for part in parts),
                parts=parts,
            )
        )
    return counts


def _run_on_meta(network: TableNetwork, size: int) -> tuple[dict[str, Shape], dict[str, int]]:
    """The shape of each module's output for one image, and each module's flops, by the module's name."""
    on_meta = copy.deepcopy(network).to("meta").eval()
    on_meta.training = True  # of the network alone: it then runs its auxiliary heads
    shapes: dict[str, Shape] = {}

    def record(name: str, output: object) -> None:
        if isinstance(output, Tensor):
            shapes[name] = tuple(output.shape[1:])

    for module in on_meta.modules():
        # The copy has the hooks of the network, and their owners must not see an image that is not one.
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        # A user's own normalisation may read values, which meta tensors do not have. None changes a shape.
        if isinstance(module, blocks.ConvNormAct):
            module.bn = nn.Identity()
    for name, module in on_meta.named_modules():
        module.register_forward_hook(lambda _module, _inputs, output, name=name: record(name, output))
    image = torch.zeros(1, on_meta.in_channels, size, size, dtype=on_meta.fc.weight.dtype, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        on_meta(image)
    prefix = f"{type(on_meta).__name__}."
    return shapes, {name.removeprefix(prefix): sum(of.values()) for name, of in counter.get_flop_counts().items()}


def _parts(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every convolution, normalisation and linear layer in a module (or the module itself), by its full name."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        yield name, module
        return
    for child_name, child in module.named_children():
        if isinstance(module, blocks.ConvNormAct) and child is module.bn:  # one part, whatever it is made of
            if not isinstance(child, nn.Identity):
                yield f"{name}.{child_name}", child
        else:
            yield from _parts(f"{name}.{child_name}", child)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _kind(module: nn.Module) -> str:
    """A description of a layer in a few words."""
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
            return "inception" + (_stride(pool.stride) if isinstance(pool, blocks.BranchPool) else "")
        case nn.MaxPool2d():
            return f"{module.kernel_size}x{module.kernel_size} max pooling" + _stride(module.stride)
        case blocks.GlobalPool():
            return "mean of each map"
        case nn.LocalResponseNorm():
            return "local response normalisation"
        case blocks.FlattenPixels():
            return f"{module.side}x{module.side} pixels as a vector"
    return type(module).__name__  # a normalisation layer


def _convolution(module: nn.Module) -> str:
    assert isinstance(module, nn.Conv2d)
    height, width = module.kernel_size
    return f"{height}x{width} convolution" + _stride(module.stride[0])


def _stride(stride: object) -> str:
    return "" if stride == 1 else f", stride {stride}"
