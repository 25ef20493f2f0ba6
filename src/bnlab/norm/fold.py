"""Fold batch normalisation into the convolution or linear layer before it, for inference.

With stored statistics batch normalisation is a linear function of each channel, as is the layer before it:

    scale = gamma / sqrt(var + eps)        W -> W * scale        b -> (b - mean) * scale + beta

(arXiv 1502.03167, Alg. 2, step 11, applied to the weights), computed in float64. The graph that torch.fx traces shows
which layer comes before. Identities and dropout are passed over, and a layer after a concatenation is folded slice by
slice into each of the layers before it. Where anything else may read the values between the two layers, or where there
is no graph, the layer is kept, and the reason is given.

A graph does not show everything. `fold` assumes the following, or checks it with an `example`: the model is run
through `forward`; its branches do not depend on attributes that change, or on the type of a value; it does not compute
weights outside of its layers; and, where it cannot be traced as one, each part that overrides forward is run through
that forward.

Shapes: N examples, C channels, then any number of positions.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves

from bnlab.norm.fold_trace import FOLDABLE, TRANSPOSED, Region, has_plain_forward, trace_regions
from bnlab.norm.layers import BatchNorm, batch_norm_layers, is_plain
from bnlab.norm.model_utils import hooked, unwrap_model

_SHAPES = {2: "N x C", 3: "N x C x L", 4: "N x C x H x W", 5: "N x C x D x H x W"}
_IDENTITIES = (nn.Identity, nn.modules.dropout._DropoutNd)  # in evaluation
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


class CannotFold(Exception):  # noqa: N818  # not an error, but a reason
    """The reason why a layer is kept."""


class Folded(nn.Module):
    """Replaces a layer that was folded into `layers`: the identity, or ReLU where the layer was called with relu=True.

    Raises:
        ValueError: the input does not have `dims` dimensions, so that its channels are not those of `layers` (the
            features of a linear layer come last, but batch normalisation takes the second dimension).
    """

    def __init__(self, name: str, layers: tuple[str, ...], dims: int) -> None:
        super().__init__()
        self.layers, self.dims = layers, dims
        self.refusal = (
            f"{name} was folded into {', '.join(layers)} for {_SHAPES[dims]}, and got another number of dimensions: "
            "run the model that was not folded"
        )
        self.eval()

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        """Return the input, N x C x ...; ReLU is in place, since nothing else uses the input."""
        if input.dim() != self.dims:
            raise ValueError(self.refusal)
        return F.relu(input, inplace=True) if relu else input

    def extra_repr(self) -> str:
        return f"into {', '.join(self.layers)}"


@dataclass(frozen=True)
class Folding:
    model: nn.Module
    """a copy of the model in evaluation mode; it has fewer tensors, so it cannot load a checkpoint of the original"""
    folded: dict[str, tuple[str, ...]]
    """each layer that was folded, with the layers that it was folded into"""
    kept: dict[str, str]
    """each layer that was kept, with the reason"""


def fold(model: nn.Module, example: Any = None) -> Folding:
    """Return a copy of the model for inference, in which batch normalisation is folded into other layers.

    With an `example`, a batch or a tuple of arguments, the outputs of both models are compared. Pass one if the model
    does what no graph shows, such as branches on attributes that change or weights computed outside of layers.

    All layers that derive from torch.nn's batch normalisation are considered, on any device. The model itself is not
    changed. Of a DistributedDataParallel the inner module is folded.

    Raises:
        ValueError: the outputs for the example differ by more than 1e-3 of their standard deviation.
    """
    network = unwrap_model(model)
    copied = copy.deepcopy(network).eval()
    regions, untraced = trace_regions(copied)
    names = {module: name for name, module in copied.named_modules()}
    planned: list[tuple[str, _BatchNorm, list[nn.Module]]] = []
    folded: dict[str, tuple[str, ...]] = {}
    kept: dict[str, str] = {}
    for name, norm in batch_norm_layers(copied):
        try:
            planned.append((name, norm, _layers_before(norm, regions, untraced)))
        except CannotFold as reason:
            kept[name] = str(reason)
    for name, norm, layers in planned:  # only now, with the plan complete, do layers change
        try:
            _fold_into(layers, norm, names)
        except CannotFold as reason:
            kept[name] = str(reason)
            continue
        folded[name] = tuple(names[layer] for layer in layers)
        new = Folded(name, folded[name], _output_dims(layers[0]))
        # The layer becomes the new one, because the model may refer to it under several names or in a plain list.
        attributes = {key: value for key, value in vars(norm).items() if key not in vars(new) and key[0] != "_"}
        norm.__class__, norm.__dict__ = Folded, vars(new) | attributes  # type: ignore[assignment]
    for region in regions:
        for node in region.nodes():
            if node.target in (F.batch_norm, torch.batch_norm):
                name = f"F.batch_norm ({node.name} in {region.name})"
                kept[name] = "it is a function, which takes its parameters from elsewhere"
    if example is not None:
        _compare(network, copied, example if isinstance(example, tuple) else (example,))
    return Folding(copied, folded, kept)


@torch.no_grad()
def _compare(model: nn.Module, folded: nn.Module, example: tuple[Any, ...]) -> None:
    plain = copy.deepcopy(model).eval()
    for expected, found in zip(tree_leaves(plain(*example)), tree_leaves(folded(*example)), strict=True):
        if isinstance(expected, Tensor) and expected.numel():
            off = float((found - expected).abs().max()) / max(float(expected.std(correction=0)), 1e-30)
            if not off < 1e-3:
                raise ValueError(
                    f"the folded model's output differs by {off:.2g} of its standard deviation: "
                    "the model does what its graph does not show, so it cannot be folded"
                )


# Which layers a batch normalisation layer can be folded into.


def _layers_before(norm: _BatchNorm, regions: list[Region], untraced: dict[nn.Module, str]) -> list[nn.Module]:
    """Return the layers whose outputs `norm` normalises, in the order of their channels."""
    _check_norm(norm)
    region = next((region for region in regions if norm in set(region.module.modules())), None)
    if region is None:
        raise CannotFold(untraced[norm])
    if norm in region.shared:
        raise CannotFold(f"it is also used outside of {region.name}, in a part that cannot be traced")
    calls = [node for node in region.nodes() if region.called(node) is norm]
    if not calls:
        raise CannotFold("inference never reaches it")
    if region.reads(calls[0]):
        raise CannotFold("its parameters or statistics are also used elsewhere")
    found = [_source_calls(_input(call), region) for call in calls]
    layers = [[region.called(node) for node in nodes] for nodes in found]
    if any(others != layers[0] for others in layers):
        raise CannotFold("it is called after different layers")
    sources = {node for nodes in found for node in nodes}
    for node, layer in zip(found[0], layers[0], strict=True):
        twice = layers[0].count(layer) > 1
        if twice or any(region.called(other) is layer and other not in sources for other in region.nodes()):
            raise CannotFold(f"{region.describe(node)} before it is also called elsewhere")
    return [layer for layer in layers[0] if layer is not None]


def _check_norm(norm: _BatchNorm) -> None:
    if not is_plain(norm):
        raise CannotFold(f"{type(norm).__name__} overrides forward")
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
        raise CannotFold("a hook is registered on it")


def _check_layer(layer: nn.Module, node: fx.Node, region: Region) -> None:
    what = region.describe(node)
    if not has_plain_forward(layer):
        raise CannotFold(f"{what} before it overrides forward")
    if is_parametrized(layer) or not {"weight", "bias"} <= layer._parameters.keys():
        raise CannotFold(f"the parameters of {what} before it are parametrised")
    if hooked(layer):
        raise CannotFold(f"a hook is registered on {what} before it")
    if region.reads(node):
        raise CannotFold(f"the parameters of {what} before it are also used elsewhere")
    if layer in region.shared:
        raise CannotFold(f"{what} before it is also used outside of {region.name}, in a part that cannot be traced")


def _source_calls(value: Any, region: Region) -> list[fx.Node]:
    """Return the calls of the layers whose outputs make up `value`, in the order of their channels."""
    if not isinstance(value, fx.Node):
        raise CannotFold("a constant comes before it, not a convolution or linear layer")
    what = region.describe(value)
    module = region.called(value)
    if module is not None and isinstance(module, tuple(FOLDABLE)):
        _check_layer(module, value, region)
        found = [value]
    elif _is_identity(value, module):
        found = _source_calls(_input(value), region)
    elif value.target in _CONCATENATIONS and isinstance(parts := _input(value, "tensors"), (list, tuple)):
        found = [node for part in parts for node in _source_calls(part, region)]
        dim = value.args[1] if len(value.args) > 1 else value.kwargs.get("dim", value.kwargs.get("axis", 0))
        if dim not in (1, 1 - _output_dims(region.called(found[0]))):
            raise CannotFold(f"a concatenation along dimension {dim}, not along the channels, comes before it")
    else:
        raise CannotFold(f"{what} comes before it, not a convolution or linear layer")
    if value in region.hooked_nodes:
        raise CannotFold(f"a hook reads the output of {what} before it")
    if len(value.users) > 1 or value in region.stored:
        raise CannotFold(f"the output of {what} before it is also used elsewhere")
    return found


def _input(call: fx.Node, name: str = "input") -> Any:
    return call.args[0] if call.args else call.kwargs.get(name)


def _is_identity(node: fx.Node, module: nn.Module | None) -> bool:
    if isinstance(module, _IDENTITIES):
        return not module.training and "forward" not in vars(module)
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
    return node.target in _DROPOUTS and training is False


def _output_dims(layer: nn.Module | None) -> int:
    return next(dims for kind, dims in FOLDABLE.items() if isinstance(layer, kind))


# The new weights.


@torch.no_grad()
def _fold_into(layers: list[nn.Module], norm: _BatchNorm, names: dict[nn.Module, str]) -> None:
    """Fold `norm` into the weights and biases of the layers, or change none of them."""
    widths = [getattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels") for layer in layers]
    if sum(widths) != norm.num_features:
        raise CannotFold(f"it is for {norm.num_features} channels, and the layers before it have {sum(widths)}")
    if nn.Linear in map(type, layers) and isinstance(norm, (nn.BatchNorm2d, nn.BatchNorm3d)):
        raise CannotFold("it is for images, in which the features of a linear layer are not the channels")
    assert norm.running_mean is not None and norm.running_var is not None
    mean, var = _exact(norm.running_mean), _exact(norm.running_var)  # C
    scale = (var + norm.eps).rsqrt() * (1 if norm.weight is None else _exact(norm.weight))
    beta = torch.zeros_like(mean) if norm.bias is None else _exact(norm.bias)
    if not bool((scale * mean + beta).isfinite().all()):
        raise CannotFold("its scale or shift is not finite")
    new_parameters = []
    slices = (torch.split(values, widths) for values in (scale, mean, beta))
    for layer, s, m, b in zip(layers, *slices, strict=True):
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        assert weight is not None
        new_bias = torch.empty(len(s), dtype=weight.dtype, device=weight.device)
        new_bias.copy_(((0 if bias is None else _exact(bias)) - m) * s + b)
        new_weight = torch.empty_like(weight).copy_(_scaled(layer, s))  # empty_like keeps the memory format
        if not bool(new_weight.isfinite().all() and new_bias.isfinite().all()):
            raise CannotFold(f"the weights of {names[layer]} would not be finite in {weight.dtype}")
        learns = (weight if bias is None else bias).requires_grad
        new_parameters.append((nn.Parameter(new_weight, weight.requires_grad), nn.Parameter(new_bias, learns)))
    for layer, (weight, bias) in zip(layers, new_parameters, strict=True):
        layer.weight, layer.bias = weight, bias


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()  # on the CPU, because other devices may lack float64


def _scaled(layer: Any, scale: Tensor) -> Tensor:
    weight = _exact(layer.weight)
    if not isinstance(layer, TRANSPOSED):  # C x inputs x ...
        return weight * scale.view(-1, *[1] * (weight.ndim - 1))
    groups = layer.groups  # inputs x C / groups x ..., the groups one after the other along the inputs
    factors = scale.view(groups, 1, -1, *[1] * (weight.ndim - 2))
    return (weight.view(groups, -1, *weight.shape[1:]) * factors).flatten(0, 1)
