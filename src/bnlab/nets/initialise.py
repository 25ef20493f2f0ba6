"""The weights that a network begins with."""

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
_SATURATING = ("sigmoid", "tanh", "none")


def choose(scheme: str | None, activation: str) -> Fill:
    """The function that fills the weights of a convolution or fully connected layer before an activation.

    "he": N(0, 2 / fan-out), for activations that pass one sign (He et al. 2015, arXiv 1502.01852); "xavier":
    N(0, 2 / (fan-in + fan-out)), for those that pass both (Glorot & Bengio 2010); "gaussian:STD": N(0, STD^2), as in
    the paper's first experiment (sec. 4.1). None: the one that suits the activation.

    Raises:
        UsageError: no initialisation has that name, or its standard deviation is not valid.
    """
    if scheme is None:
        scheme = "xavier" if activation in _SATURATING else "he"
    word, std = split_number("initialisation", scheme, ("he", "xavier", "gaussian"), with_number=("gaussian",))
    if word == "xavier":
        return nn.init.xavier_normal_
    if word == "he":
        return partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
    if std is None or not 0 < std < math.inf:
        raise UsageError(
            f"initialisation {printable(scheme)} is not valid", "give its standard deviation, as in gaussian:0.05"
        )
    return partial(nn.init.normal_, std=std)


def initialise(network: nn.Module, fill: Fill) -> None:
    """Apply `fill` to the weights of every ConvNormAct, and set all biases to 0.

    Other linear layers, such as the last, get N(0, 0.01^2), so that all classes start alike. The first half of a
    separable convolution has no activation after it, and keeps the variance of its input instead.
    """
    before_activation = {_last_layer(unit) for unit in conv_norm_acts(network)}
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
    """Scale each ConvNormAct so that its layer's outputs for these images have a root mean square of 1.

    This is what batch normalisation does for the scale of a network, done once before training (Mishkin & Matas 2016,
    arXiv 1511.06422), in one forward pass: each layer gets the outputs of the layers that are scaled already. A layer
    whose outputs are all 0 is not scaled.

    Complete layers are scaled and no mean is moved: standardised channel by channel (Salimans & Kingma 2016,
    arXiv 1602.07868), a deep network diverged in trials in which this one trained.

    Args:
        network: without normalisation. If it is in training mode, its auxiliary heads are scaled as well.
        images: N x C x H x W.

    Returns:
        How many layers were scaled.

    Raises:
        UsageError: the network is normalised, or outputs are not finite or out of range. Nothing is changed then.
    """
    check_unnormalised(network)
    scales: dict[nn.Conv2d | nn.Linear, Tensor] = {}

    def scale_output(layer: Any, _: Any, output: Tensor) -> Tensor:
        square = output.double().square().mean()
        if not square.isfinite():
            raise UsageError(
                "the outputs of a layer for these images are not finite", "check the images, or use another seed"
            )
        scales[layer] = scale = torch.where(square > 0, square.rsqrt(), 1.0).to(output.dtype)
        if not (scale.isfinite() and scale):
            raise UsageError("the outputs of a layer are too small or too large to scale", "use another initialisation")
        return output * scale

    hooks = [_last_layer(unit).register_forward_hook(scale_output) for unit in conv_norm_acts(network)]
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
    """Raise UsageError if a network has normalisation layers, which would undo what `lsuv_init` does."""
    if is_normalised(network):
        raise UsageError(
            "normalisation would undo the scale that lsuv_init gives to weights",
            "leave lsuv_init out, or use a network without normalisation, such as googlenet",
        )


def _last_layer(unit: ConvNormAct) -> nn.Conv2d | nn.Linear:
    layer = unit.layer[-1] if isinstance(unit.layer, nn.Sequential) else unit.layer
    return cast(nn.Conv2d | nn.Linear, layer)
