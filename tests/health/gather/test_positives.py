"""Positive outputs are counted in the channels that are asked for, and only then."""

import numpy as np
import torch
from torch import nn

from bnlab.health.gather.positives import counting


def counts(x: torch.Tensor, *, when: bool = True) -> list[float]:
    layer = nn.Identity()
    positives = {"layer": np.array([0.0, np.nan, 0.0])}
    with counting({"layer": layer}, positives, lambda: when):
        layer(x)
        layer(x)
    layer(x)  # no longer
    return positives["layer"].tolist()


def test_counts_values_above_0_of_each_channel_that_is_not_nan() -> None:
    x = torch.tensor([[[1.0, -1, 0], [5, 5, 5], [2, 3, -4]], [[-1, -1, -1], [5, 5, 5], [1, 1, 1]]])  # N x C x L
    first, second, third = counts(x)
    assert (first, third) == (2, 10)  # in two forwards
    assert np.isnan(second)


def test_nan_counts_as_positive() -> None:
    first, _, third = counts(torch.tensor([[float("nan"), 0.0, -1.0]]))
    assert (first, third) == (2, 0)


def test_counts_only_when_asked() -> None:
    first, _, third = counts(torch.ones(2, 3), when=False)
    assert (first, third) == (0, 0)
