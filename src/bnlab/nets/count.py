"""How large a network is, and how much it computes: parameters and multiply-adds, layer by layer.

torch's FlopCounterMode counts the operations. It knows neither the kinds of layers nor the shapes of their outputs.
"""

import copy
from dataclasses import dataclass
from typing import Any

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
    name: str  # As in the state_dict, without `.weight`.
    kind: str
    output: Shape
    parameters: int  # Trained or frozen.
    multiply_adds: int  # For one image.


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
    layers: list[LayerCount] = []
    parts: list[PartCount] = []  # of the layer whose output comes next
    for name, shape in shapes.items():
        module = network.get_submodule(name)
        parameters = sum(parameter.numel() for parameter in module.parameters())
        described: dict[str, Any] = {"name": name, "kind": _kind(module), "output": shape, "parameters": parameters}
        norm = name.endswith(".bn") and not isinstance(module, nn.Identity)  # one part, whatever it is made of
        if norm or isinstance(module, nn.Conv2d | nn.Linear):
            parts.append(PartCount(**described, multiply_adds=flops.get(name, 0) // 2))
        if name and "." not in name and not isinstance(module, nn.Dropout | nn.Identity):
            multiply_adds = sum(part.multiply_adds for part in parts)
            layers.append(LayerCount(**described, multiply_adds=multiply_adds, parts=tuple(parts)))
            parts = []
    return layers


def _run_on_meta(network: TableNetwork, size: int) -> tuple[dict[str, Shape], dict[str, int]]:
    """The shape of each module's output for one image, in the order of the outputs, and each module's flops."""
    on_meta = copy.deepcopy(network).to("meta").eval()
    on_meta.training = True  # of the network alone: it then runs its auxiliary heads
    shapes: dict[str, Shape] = {}

    def record(name: str, output: object) -> None:
        if isinstance(output, Tensor):
            shapes[name] = tuple(output.shape[1:])

    for name, module in on_meta.named_modules():
        # The copy has the hooks of the network, and their owners must not see an image that is not one.
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        # A user's own normalisation may read values, which meta tensors do not have. None changes a shape.
        if isinstance(module, blocks.ConvNormAct):
            module.bn = nn.Identity()
        module.register_forward_hook(lambda _module, _inputs, output, name=name: record(name, output))
    image = torch.zeros(1, on_meta.in_channels, size, size, dtype=on_meta.fc.weight.dtype, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        on_meta(image)
    prefix = f"{type(on_meta).__name__}."
    return shapes, {name.removeprefix(prefix): sum(of.values()) for name, of in counter.get_flop_counts().items()}


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
            return "inception" + _stride(module.stride)
        case blocks.AuxiliaryHead():
            return "auxiliary head"
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
