"""The new weights and biases of layers that take the scale and shift of a batch normalisation, computed in float64."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnlab.norm.folding.flow import CannotFold
from bnlab.norm.folding.trace import TRANSPOSED


class Affine(NamedTuple):
    """(x - mean) * scale + beta, C each, in float64 on the CPU."""

    scale: Tensor
    mean: Tensor
    beta: Tensor


def exact(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()  # on the CPU, because other devices may lack float64


def widths(layers: list[nn.Module]) -> int:
    return sum(_width(layer) for layer in layers)


def _width(layer: Any) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


@torch.no_grad()
def fold_into(layers: list[nn.Module], affine: Affine, names: dict[nn.Module, str]) -> None:
    """Fold into the weights and biases of the layers, or change none of them."""
    each = [_width(layer) for layer in layers]
    scale, mean, beta = affine
    if sum(each) != len(scale):
        raise CannotFold(f"it is for {len(scale)} channels, and the layers before it have {sum(each)}")
    if not bool((scale * mean + beta).isfinite().all()):
        raise CannotFold("its scale or shift is not finite")
    new_parameters = []
    slices = (torch.split(values, each) for values in (scale, mean, beta))
    for layer, s, m, b in zip(layers, *slices, strict=True):
        bias = layer._parameters["bias"]
        new_bias = ((0 if bias is None else exact(bias)) - m) * s + b
        new_parameters.append(_rounded(layer, _scaled(layer, s), new_bias, names))
    for layer, (weight, bias) in zip(layers, new_parameters, strict=True):
        layer.weight, layer.bias = weight, bias


@torch.no_grad()
def fold_into_next(layers: list[nn.Module], affine: Affine, names: dict[nn.Module, str]) -> None:
    """Fold into the weights and the bias of the one layer that follows."""
    layer: Any = layers[0]
    scale, mean, beta = affine
    weight, groups = exact(layer.weight), getattr(layer, "groups", 1)  # outputs x inputs / groups x ...
    if weight.shape[1] * groups != len(scale):
        raise CannotFold(f"it is for {len(scale)} channels, and the layer after it takes {weight.shape[1] * groups}")
    if not bool((scale * mean + beta).isfinite().all()):
        raise CannotFold("its scale or shift is not finite")
    by_input = (1, groups, 1, -1, *[1] * (weight.ndim - 2))
    grouped = weight.view(1, groups, -1, *weight.shape[1:])
    shift = (grouped * (beta - mean * scale).view(by_input)).flatten(3).sum(3).flatten()
    scaled = (grouped * scale.view(by_input)).view(weight.shape)
    bias = (0 if layer.bias is None else exact(layer.bias)) + shift
    layer.weight, layer.bias = _rounded(layer, scaled, bias, names)


def _rounded(
    layer: nn.Module, new_weight: Tensor, new_bias: Tensor, names: dict[nn.Module, str]
) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the parameters in the layer's type, on its device and in its memory format."""
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None
    new = torch.empty_like(weight).copy_(new_weight)  # empty_like keeps the memory format
    shift = torch.empty(len(new_bias), dtype=weight.dtype, device=weight.device).copy_(new_bias)
    if not bool(new.isfinite().all() and shift.isfinite().all()):
        raise CannotFold(f"the weights of {names[layer]} would not be finite in {weight.dtype}")
    learns = (weight if bias is None else bias).requires_grad
    return nn.Parameter(new, weight.requires_grad), nn.Parameter(shift, learns)


def _scaled(layer: Any, scale: Tensor) -> Tensor:
    weight = exact(layer.weight)
    if not isinstance(layer, TRANSPOSED):  # C x inputs x ...
        return weight * scale.view(-1, *[1] * (weight.ndim - 1))
    groups = layer.groups  # inputs x C / groups x ..., the groups one after the other along the inputs
    factors = scale.view(groups, 1, -1, *[1] * (weight.ndim - 2))
    return (weight.view(groups, -1, *weight.shape[1:]) * factors).flatten(0, 1)
