"""Fold batch normalisation into the convolution or linear layer before it, for inference.

With stored statistics batch normalisation is a linear function of each channel, as is what comes before it:

    scale = gamma / sqrt(var + eps)        W -> W * scale        b -> (b - mean) * scale + beta

(arXiv 1502.03167, Alg. 2, step 11, carried into the weights), computed in float64. Which layer comes before is read off
the graph that torch.fx traces, where identities and dropout are passed over, and a layer after a concatenation goes
slice by slice into each of those before it. Where anything else may see the values between the two, or where the graph
cannot be had, the layer stays, and the reason is given.

What no graph shows is taken on trust, or is tried out with an `example`: that the model is run through `forward`; that
its branches do not turn on attributes that change, or on what type a value is; that weights are not computed on the
side; and, where it cannot be traced as a whole, that each part with a forward of its own is run through that.

Shapes: N examples, C channels, then any number of positions.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from bnlab.norm.fold_pairs import CannotFold, dims_of, layers_before
from bnlab.norm.fold_trace import TRANSPOSED, survey
from bnlab.norm.layers import batch_norm_layers
from bnlab.norm.models import unwrap_model

_SHAPES = {2: "N x C", 3: "N x C x L", 4: "N x C x H x W", 5: "N x C x D x H x W"}


class Folded(nn.Module):
    """What stands in place of a layer that was folded into `layers`: the identity, or ReLU if it is asked for.

    Raises:
        ValueError: an input of other than `dims` dimensions, whose channels are not the layers' (a linear layer's
            features come last, and those batch normalisation goes by second).
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
        """As it came, N x C x ...; rectified in place, for nothing else uses it."""
        if input.dim() != self.dims:
            raise ValueError(self.refusal)
        return F.relu(input, inplace=True) if relu else input

    def extra_repr(self) -> str:
        """Where it went."""
        return f"into {', '.join(self.layers)}"


@dataclass(frozen=True)
class Folding:
    """What `fold` did."""

    model: nn.Module
    """a copy of the model in evaluation mode; its tensors are fewer, so that it takes no checkpoint of the original"""
    folded: dict[str, tuple[str, ...]]
    """each layer that was folded, and those it went into"""
    kept: dict[str, str]
    """each layer that stays, and why"""


def fold(model: nn.Module, example: Any = None) -> Folding:
    """A copy of the model for inference, without the batch normalisation layers that others can take the work of.

    With an `example`, a batch or a tuple of arguments, both are run on it. Give one where the model does what no graph
    shows: branches on attributes that change, weights computed on the side.

    All that derive from torch.nn's are considered, in a model on any device; the model given is left as it is. Of a
    DistributedDataParallel the module is taken: without layers' buffers it cannot run.

    Raises:
        ValueError: the outputs for the example differ by more than 1e-3 of their standard deviation.
    """
    network = unwrap_model(model)
    copied = copy.deepcopy(network).eval()
    regions, untraced = survey(copied)
    names = {module: name for name, module in copied.named_modules()}
    planned: list[tuple[str, _BatchNorm, list[nn.Module]]] = []
    folded: dict[str, tuple[str, ...]] = {}
    kept: dict[str, str] = {}
    for name, norm in batch_norm_layers(copied):
        try:
            planned.append((name, norm, layers_before(norm, regions, untraced)))
        except CannotFold as reason:
            kept[name] = str(reason)
    for name, norm, layers in planned:  # the plan is complete: from here on, layers change
        try:
            _fold_into(layers, norm, names)
        except CannotFold as reason:
            kept[name] = str(reason)
            continue
        folded[name] = tuple(names[layer] for layer in layers)
        stand_in = Folded(name, folded[name], dims_of(layers[0]))
        # Not replaced but turned into it: it may be held under several names, or in a plain list.
        kept_attributes = {
            key: value for key, value in vars(norm).items() if key not in vars(stand_in) and key[0] != "_"
        }
        norm.__class__, norm.__dict__ = Folded, vars(stand_in) | kept_attributes  # type: ignore[assignment]
    for region in regions:
        for node in region.nodes():
            if node.target in (F.batch_norm, torch.batch_norm):
                kept[f"F.batch_norm ({node.name} in {region.name})"] = (
                    "it is a function, which takes its parameters from elsewhere"
                )
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
                    "the model does what its graph does not show, and cannot be folded"
                )


@torch.no_grad()
def _fold_into(layers: list[nn.Module], norm: _BatchNorm, names: dict[nn.Module, str]) -> None:
    """Give the layers the weights and biases that take in its work; on refusal, none of them."""
    widths = [getattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels") for layer in layers]
    if sum(widths) != norm.num_features:
        raise CannotFold(f"it is for {norm.num_features} channels, and what is before it gives {sum(widths)}")
    if nn.Linear in map(type, layers) and isinstance(norm, (nn.BatchNorm2d, nn.BatchNorm3d)):
        raise CannotFold("it takes images, where a linear layer's features are not the channels")
    assert norm.running_mean is not None and norm.running_var is not None
    mean, var = _exact(norm.running_mean), _exact(norm.running_var)  # C
    scale = (var + norm.eps).rsqrt() * (1 if norm.weight is None else _exact(norm.weight))
    beta = torch.zeros_like(mean) if norm.bias is None else _exact(norm.bias)
    if not bool((scale * mean + beta).isfinite().all()):
        raise CannotFold("its scale or shift is not finite")
    done = []
    slices = (torch.split(values, widths) for values in (scale, mean, beta))
    for layer, s, m, b in zip(layers, *slices, strict=True):
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        assert weight is not None
        new_bias = torch.empty(len(s), dtype=weight.dtype, device=weight.device)
        new_bias.copy_(((0 if bias is None else _exact(bias)) - m) * s + b)
        new_weight = torch.empty_like(weight).copy_(_scaled(layer, s))  # empty_like keeps the order in memory
        if not bool(new_weight.isfinite().all() and new_bias.isfinite().all()):
            raise CannotFold(f"the weights of {names[layer]} would not be finite in {weight.dtype}")
        learns = (weight if bias is None else bias).requires_grad
        done.append((nn.Parameter(new_weight, weight.requires_grad), nn.Parameter(new_bias, learns)))
    for layer, (weight, bias) in zip(layers, done, strict=True):
        layer.weight, layer.bias = weight, bias


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()  # on the CPU: other devices may know no float64


def _scaled(layer: Any, scale: Tensor) -> Tensor:
    weight = _exact(layer.weight)
    if not isinstance(layer, TRANSPOSED):  # C x inputs x ...
        return weight * scale.view(-1, *[1] * (weight.ndim - 1))
    groups = layer.groups  # inputs x C / groups x ..., the groups one after the other along the inputs
    wide = scale.view(groups, 1, -1, *[1] * (weight.ndim - 2))
    return (weight.view(groups, -1, *weight.shape[1:]) * wide).flatten(0, 1)
