"""What is added up of the inputs of a layer, against the same by NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from bnlab.health.gather.recorder import EXACT, Recorder
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
    assert float(np.abs(values).max()) <= sample.largest < EXACT


def test_large_values_are_exact() -> None:
    x = torch.randn(4, 3, 2, 2)
    x[1, 2, 0, 1] = -40000
    assert recorded([x]).samples()["norm"].largest == 40000


def test_a_layer_may_be_called_in_some_batches_alone_and_more_than_once() -> None:
    torch.manual_seed(0)
    parts = {name: torch.randn(6, 4, 3, 5) + number for number, name in enumerate("ab")}
    recorder = Recorder({name: nn.BatchNorm1d(3) for name in "ab"}, images=True)
    for number in range(6):
        for name in ("a", "b", "b")[number % 2 :] if number else ("b",):
            x = parts[name][number]
            recorder.add(name, x, moments.measure(x))
        recorder.end_batch(4)
    found = recorder.samples()
    assert [found[name].batches for name in "ab"] == [2, 6]
    for name, x in (("a", parts["a"][[2, 4]]), ("b", parts["b"][[0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]])):
        values = x.double().movedim(2, 0).flatten(1).numpy()  # C x values
        assert found[name].count == values.shape[1]
        assert found[name].mean == pytest.approx(values.mean(1))
        assert found[name].variance == pytest.approx(values.var(1, ddof=1))


def test_values_that_are_not_finite_are_left_out_and_named() -> None:
    good, bad = torch.randn(4, 3, 2, 2), torch.full((4, 3, 2, 2), float("nan"))
    recorder = recorded([good, bad])
    assert recorder.not_finite == {"norm"}
    assert recorder.samples()["norm"].batches == 1
    assert not recorded([good]).not_finite
