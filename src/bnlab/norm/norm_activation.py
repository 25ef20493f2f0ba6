"""Normalisation before or after the activation.

The paper normalises before the activation (sec. 3.2). Later measurements differ from network to network
(ducha-aiki/caffenet-benchmark).
"""

from collections import OrderedDict
from typing import Literal, cast, get_args

from torch import Tensor, nn

from bnlab.norm.layers import BatchNorm, is_plain
from bnlab.norm.model_utils import hooked

Placement = Literal["before", "after"]


class NormActivation(nn.Sequential):
    """A normalisation and an activation, one after the other, N x C x ... to the same shape.

    Their names, `norm` and `activation`, do not depend on the order, so that both orders have the same state_dict.
    """

    norm: nn.Module
    activation: nn.Module

    def __init__(self, norm: nn.Module, activation: nn.Module, placement: Placement = "before") -> None:
        parts = [("norm", norm), ("activation", activation)]
        if placement not in get_args(Placement):
            raise ValueError(f"placement must be 'before' or 'after' the activation, not {placement!r}")
        super().__init__(OrderedDict(parts if placement == "before" else parts[::-1]))
        self.placement = placement

    def forward(self, input: Tensor) -> Tensor:
        return norm_activation(input, self.norm, self.activation, self.placement)


def norm_activation(x: Tensor, norm: nn.Module, activation: nn.Module, placement: Placement) -> Tensor:
    """Normalise and activate, N x C x ..., in the order of `placement`; BN and then ReLU are one call."""
    if placement == "after":
        return cast(Tensor, norm(activation(x)))
    plain = isinstance(norm, BatchNorm) and is_plain(norm) and type(activation) is nn.ReLU
    if plain and not hooked(norm) and not hooked(activation):
        return cast(Tensor, norm(x, relu=True))  # one tensor for backward, not two
    return cast(Tensor, activation(norm(x)))
