"""By which statistics the layers normalise."""

from typing import Any

import pytest
import torch
from torch import nn

from bnlab.health.gather.layers import find_layers
from bnlab.health.gather.statistics_switch import StatisticsSwitch
from bnlab.health.restore import restored
from bnlab.norm import BatchNorm1d, Whitening1d


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm1d, Whitening1d])
def test_running_and_given_statistics(norm: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(norm(2)).eval(), torch.randn(16, 2) * 3 + 1
    by_running = model(x)
    variance = torch.eye(2)[None] * 4 if norm is Whitening1d else torch.full((2,), 4.0)
    with restored(model):
        switch = StatisticsSwitch(find_layers(model))
        switch.to("population", {"0": (torch.ones(2), variance)})
        torch.testing.assert_close(model(x), (x - 1) / (4 + model[0].eps) ** 0.5, rtol=1e-3, atol=1e-3)
        switch.to("running")
        torch.testing.assert_close(model(x), by_running)
    torch.testing.assert_close(model(x), by_running)


def test_an_instance_normalisation_uses_each_image_as_in_training() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.InstanceNorm1d(2, track_running_stats=True)).eval(), torch.randn(4, 2, 9) * 3
    with restored(model):
        StatisticsSwitch(find_layers(model)).to("batch")
        torch.testing.assert_close(model(x), nn.functional.instance_norm(x))
    assert model[0].track_running_stats
