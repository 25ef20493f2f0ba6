"""The weights a network begins with."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from bnlab.errors import UsageError, printable
from bnlab.nets.blocks import ConvNormAct, conv_norm_acts, is_normalised
from bnlab.nets.options import split_number

Fill = Callable[[Tensor], object]
_SCHEMES = ("he", "xavier", "gaussian")
_SATURATING = ("sigmoid", "tanh", "none")


def choose(scheme: str | None, activation: str) -> Fill:
    """What fills the weights of the convolutions and fully connected layers before an activation.

    "he": N(0, 2 / fan-out), for activations that pass one side on (He et al. 2015, arXiv 1502.01852); "xavier":
    N(0, 2 / (fan-in + fan-out)), for those that pass both (Glorot & Bengio 2010); "gaussian:STD": N(0, STD^2), as the
    paper has it for its first experiment (sec. 4.1). None: the one that suits the activation.

    Raises:
        UsageError: there is none of that name, or its standard deviation cannot be.
    """
    if scheme is None:
        scheme = "xavier" if activation in _SATURATING else "he"
    word, std = split_number("initialisation", scheme, _SCHEMES, with_number=("gaussian",))
    if word == "xavier":
        return nn.init.xavier_normal_
    if word == "he":
        return partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
    if std is None or not 0 < std < math.inf:
        raise UsageError(
            f"initialisation {printable(scheme)} cannot be", "give its standard deviation, as in gaussian:0.05"
        )
    return partial(nn.init.normal_, std=std)


def initialise(network: nn.Module, fill: Fill) -> None:
    """Fill every unit's weights so, and other linear layers' with N(0, 0.01^2), so that classes start alike; biases 0.

    A separable convolution's first half has no activation behind it and keeps its input's variance instead.
    """
    before_activation = {_last(unit) for unit in conv_norm_acts(network)}
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if module in before_activation:
                fill(module.weight)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="linear")
            else:
                nn.init.normal_(module.weight, 0.0, 0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@torch.no_grad()
def lsuv_init(network: nn.Module, images: Tensor) -> int:
    """Scale each unit so that on these images it has a root mean square of 1 before its activation; how many.

    It is what batch normalisation does for the scale of a network, done once, at the beginning (Mishkin & Matas 2016,
    arXiv 1511.06422), in one pass: each unit sees what the ones before it now give. A unit that gives zeros alone is
    left as it is. For networks without normalisation: with it, there is nothing to do.

    It scales whole layers and moves no mean: standardised channel by channel (Salimans & Kingma 2016), a deep network
    diverged in trials where this one trained.

    Args:
        network: without normalisation. Of one in training mode the auxiliary heads are fitted, too.
        images: N x C x H x W.

    Raises:
        UsageError: the network is normalised, or a unit gives what is no finite number; nothing was changed then.
    """
    check_unnormalised(network)
    units = conv_norm_acts(network)
    scales: dict[nn.Conv2d | nn.Linear, Tensor] = {}

    def measure(layer: Any, _: Any, output: Tensor) -> Tensor:
        scales[layer] = scale = _to_one(output)
        return output * scale

    hooks = [_last(unit).register_forward_hook(measure) for unit in units]
    try:
        with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    for layer, scale in scales.items():
        layer.weight.mul_(scale)
        if layer.bias is not None:
            layer.bias.mul_(scale)
    return len(scales)


def check_unnormalised(network: nn.Module) -> None:
    """Refuse a network whose normalisation would undo what is fitted to data.

    Raises:
        UsageError: it has such layers.
    """
    if is_normalised(network):
        raise UsageError(
            "normalisation would undo weights that are fitted to data (lsuv_init)",
            "leave it out, or take a network without, such as googlenet",
        )


def _last(unit: ConvNormAct) -> nn.Conv2d | nn.Linear:
    layer = unit.layer[-1] if isinstance(unit.layer, nn.Sequential) else unit.layer
    return cast(nn.Conv2d | nn.Linear, layer)


def _to_one(output: Tensor) -> Tensor:
    """The factor that makes the output's root mean square 1; a number, as a tensor."""
    square = output.double().square().mean()
    if not square.isfinite():
        raise UsageError("a layer gives no finite numbers for these images", "check the images, or take another seed")
    scale = torch.where(square > 0, square.rsqrt(), 1.0).to(output.dtype)
    if not (scale.isfinite() and scale):
        raise UsageError("a layer's outputs are too small or too large to be scaled", "take another initialisation")
    return scale
