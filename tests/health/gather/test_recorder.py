"""What is added up of the inputs of a layer, against the same by NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from bnlab.health.gather.recorder import Recorder
from bnlab.norm import moments


def recorded(batches: list[torch.Tensor]) -> Recorder:
    recorder = Recorder({"norm": nn.BatchNorm2d(3)}, images=True)
    for x in batches:
        recorder.add("norm", x, moments.measure(x))
        recorder.end_batch(len(x))
    return recorder


def test_the_statistics_are_those_of_all_values() -> None:
    torch.manual_seed(0)
    batches = [2 * torch.randn(8, 3, 4, 4) + 5 for _ in range(40)]  # more than the groups that are kept
    sample = recorded(batches).samples()["norm"]
    values = torch.cat(batches).double().transpose(0, 1).flatten(1).numpy()  # C x values
    assert (sample.count, sample.batches) == (values.shape[1], 40)
    assert sample.mean == pytest.approx(values.mean(1))
    assert sample.variance == pytest.approx(values.var(1, ddof=1))
    means = torch.stack([x.double().mean((0, 2, 3)) for x in batches]).numpy()  # batches x C
    assert sample.between == pytest.approx(means.var(0, ddof=1))
    assert sample.largest == pytest.approx(float(np.abs(values).max()))


def test_values_that_are_not_finite_are_left_out_and_named() -> None:
    good, bad = torch.randn(4, 3, 2, 2), torch.full((4, 3, 2, 2), float("nan"))
    recorder = recorded([good, bad])
    assert recorder.not_finite == {"norm"}
    assert recorder.samples()["norm"].batches == 1
    assert not recorded([good]).not_finite
