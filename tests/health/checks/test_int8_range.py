"""The ratio of the folded weights between channels."""

import pytest
import torch
from torch import nn

from bnlab import health
from tests.health.checks.named_networks import images, sound_network, teacher_batches


def with_ratio(ratio: float) -> nn.Sequential:
    """A network in which folded weights of conv2 have a maximum of 1 in all channels but one, where it is `ratio`."""
    network = sound_network()
    conv, bn = network.conv2, network.bn2
    assert isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d) and bn.running_var is not None
    maxima = conv.weight.detach().flatten(1).abs().amax(1)
    bn.weight.data = torch.sqrt(bn.running_var + bn.eps) / maxima
    bn.weight.data[5] *= -ratio
    return network


def test_finds_channels_of_a_large_range() -> None:
    network = with_ratio(100.0)
    finding = health.diagnose(network, teacher_batches(network))["BN019"]
    assert (finding.layers, finding.severity) == (("bn2",), "info")
    assert finding.numbers["ratio"] == pytest.approx(100)
    assert finding.numbers["steps"] == pytest.approx(1.27)
    assert finding.numbers["largest_channel"] == 5


@pytest.mark.parametrize(("ratio", "found"), [(15.9, False), (16.1, True)])
def test_the_limit_is_16(ratio: float, found: bool) -> None:
    assert bool(health.diagnose(with_ratio(ratio), images(64, 32), select=["BN019"]).findings) == found


def test_is_silent_on_a_sound_network() -> None:
    network = sound_network()
    assert "BN019" not in health.diagnose(network, teacher_batches(network))


def test_channels_that_are_0_do_not_count() -> None:
    network = with_ratio(10.0)
    assert isinstance(network.bn2, nn.BatchNorm2d)
    network.bn2.weight.data[6:] = 0.0  # most of the channels
    assert not health.diagnose(network, images(64, 32), select=["BN019"]).findings
    network.bn2.weight.data[:] = 0.0
    assert not health.diagnose(network, images(64, 32), select=["BN019"]).findings


def test_weights_that_are_changed_before_their_use_are_not_known() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(x, self.weight / self.weight.std(), self.bias)

    network = with_ratio(100.0)
    network.conv2.__class__ = Standardised
    assert not health.diagnose(network, images(64, 32), select=["BN019"]).findings
