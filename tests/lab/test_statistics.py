import math

import pytest
import torch

from bnlab.lab import statistics


def test_distances_are_root_mean_squares_over_channels_that_vary() -> None:
    whole = torch.tensor([0.0, 0.0, 5.0, 9.0, 1.0, 4.0, 0.0, 1.0])
    few = torch.tensor([0.3, 0.8, 5.0, 0.0, math.e, 4.0, 0.0, 0.0])
    mean_off, variance_off = statistics.distances(few, whole)
    assert mean_off == pytest.approx(math.sqrt((0.3**2 + 0.4**2) / 2), rel=1e-6)
    assert variance_off == pytest.approx(math.sqrt(1 / 2), rel=1e-6)
    assert statistics.distances(whole, whole) == (0.0, 0.0)
