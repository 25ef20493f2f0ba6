"""Channels whose gamma is near 0, and channels that the ReLU does not change."""

from dataclasses import replace

import numpy as np
import pytest
from torch import nn

from bnlab import health
from bnlab.health.checks.gamma_near_zero import check
from bnlab.health.evidence import Evidence, LayerEvidence
from tests.health.checks.named_networks import images, sound_network, teacher_batches


@pytest.mark.parametrize(("gamma", "found"), [(0.009, True), (-0.009, True), (0.011, False)])
def test_finds_gammas_near_zero(gamma: float, found: bool) -> None:
    network = sound_network()
    assert isinstance(network.bn2, nn.BatchNorm2d)
    network.bn2.weight.data[:3] = gamma
    report = health.diagnose(network, teacher_batches(network))
    assert ("BN110" in report) == found
    if found:
        finding = report["BN110"]
        assert (finding.layers, finding.severity) == (("bn2",), "info")
        assert (finding.numbers["near_zero"], finding.numbers["linear"]) == (3, 0)


@pytest.mark.parametrize(("beta", "found"), [(3.1, True), (2.9, False)])
def test_finds_channels_that_the_relu_does_not_change(beta: float, found: bool) -> None:
    network = sound_network()
    assert isinstance(network.bn1, nn.BatchNorm2d)
    network.bn1.bias.data[:4] = beta
    report = health.diagnose(network, images(64, 32), select=["BN110"])
    assert [(f.layers, f.numbers["near_zero"], f.numbers["linear"]) for f in report.findings] == [
        (("bn1",), 0, 4)
    ] * found


def test_is_silent_on_a_sound_network() -> None:
    network = sound_network()
    assert "BN110" not in health.diagnose(network, teacher_batches(network))


def test_without_a_relu_no_channel_is_linear() -> None:
    network = sound_network()
    assert isinstance(network.bn2, nn.BatchNorm2d)
    network.bn2.bias.data[:] = 10
    network.relu2 = nn.SiLU()
    assert not health.diagnose(network, images(64, 32), select=["BN110"]).findings


def test_reads_what_a_layer_shows_without_images() -> None:
    """As the monitor of a training does."""
    layer = LayerEvidence(
        name="bn",
        kind="BatchNorm2d",
        family="batch",
        channels=40,
        eps=1e-5,
        gamma=np.r_[np.zeros(3), np.ones(37)],
        beta=np.zeros(40),
        gamma_trained=True,
    )
    (finding,) = check(Evidence(layers={"bn": layer}))
    assert (finding.layers, finding.numbers["near_zero"]) == (("bn",), 3)
    assert not check(Evidence(layers={"bn": replace(layer, gamma=np.r_[-np.ones(3), np.ones(37)])}))  # not near 0
    two = np.r_[np.zeros(2), np.ones(38)]
    assert not check(Evidence(layers={"bn": replace(layer, gamma=two)}))  # 5% and no more
    assert not check(Evidence(layers={"bn": replace(layer, gamma_trained=False)}))
    assert not check(Evidence(layers={"bn": replace(layer, gamma=np.zeros(40))}))  # as residual branches begin
