"""Normalisation before or after the activation.

The paper places it before (sec. 3.2). Later measurements disagree, by network: ducha-aiki/caffenet-benchmark.
"""

from collections import OrderedDict
from typing import Literal, cast

from torch import Tensor, nn

from bnlab.norm.layers import BatchNorm
from bnlab.norm.models import hooked


class Placed(nn.Sequential):
    """A normalisation and an activation, one after the other; N x C x ... in and out.

    Their names, `norm` and `activation`, do not depend on the order, so that weights can be exchanged between both.
    """

    norm: nn.Module
    activation: nn.Module

    def __init__(
        self, norm: nn.Module, activation: nn.Module, placement: Literal["before", "after"] = "before"
    ) -> None:
        parts = [("norm", norm), ("activation", activation)]
        if placement not in ("before", "after"):
            raise ValueError(f"normalisation is placed 'before' or 'after' the activation, not {placement!r}")
        super().__init__(OrderedDict(parts if placement == "before" else parts[::-1]))
        self.placement = placement

    def forward(self, input: Tensor) -> Tensor:
        """Normalised and activated."""
        fits = self.placement == "before" and isinstance(self.norm, BatchNorm) and type(self.activation) is nn.ReLU
        if fits and not hooked(self.norm) and not hooked(self.activation):
            return cast(Tensor, self.norm(input, relu=True))  # one tensor for backward, not two
        return cast(Tensor, super().forward(input))  # type: ignore[no-untyped-call]
