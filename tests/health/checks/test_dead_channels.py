"""Channels that a ReLU blocks, by gamma and beta, and by counting."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from bnlab import health
from bnlab.health.checks.dead_channels import check
from bnlab.health.evidence import Evidence, LayerEvidence
from tests.health.checks.named_networks import images, sound_network, teacher_batches


def with_dead(*channels: int, beta: float = -50.0, layer: str = "bn2") -> nn.Sequential:
    network = sound_network()
    norm = network.get_submodule(layer)
    assert isinstance(norm, nn.BatchNorm2d)
    norm.bias.data[list(channels)] = beta
    return network


def test_finds_dead_channels() -> None:
    network = with_dead(2, 7)
    finding = health.diagnose(network, teacher_batches(network))["BN109"]
    assert finding.layers == ("bn2",)
    assert (finding.numbers["dead"], finding.numbers["channels"]) == (2, 16)
    assert finding.numbers["which"] == {"bn2": [2, 7]}
    values = 256 * 4 * 4  # images x positions
    assert (finding.numbers["values"], finding.numbers["at_most"]) == (values, 3 / values)


@pytest.mark.parametrize(("number", "severity"), [(4, "info"), (5, "warn")])
def test_more_than_a_quarter_is_a_warning(number: int, severity: str) -> None:
    (finding,) = health.diagnose(with_dead(*range(number)), images(64, 32), select=["BN109"]).findings
    assert (finding.numbers["dead"], finding.severity) == (number, severity)


def test_is_silent_on_a_sound_network() -> None:
    network = sound_network()
    assert "BN109" not in health.diagnose(network, teacher_batches(network))


def test_channels_that_pass_something_are_not_dead() -> None:
    """By the normal distribution a channel passes fewer than 1 in 1,000 values, but its values have heavy tails."""
    network = with_dead(0, 1, beta=-3.5, layer="bn1")
    batches = images(256, 32)
    for x in batches:
        x[0, :, 2, 2] = 100.0
    norm = network.bn1
    assert isinstance(norm, nn.BatchNorm2d)
    counts: list[int] = []
    handle = norm.register_forward_hook(lambda module, args, output: counts.append(int((output[:, :2] > 0).sum())))
    with torch.no_grad():
        for x in batches:
            network(x)
    handle.remove()
    assert sum(counts) > 0
    report = health.diagnose(network, batches, select=["BN109"])
    layer = report.evidence.layers["bn1"]
    assert layer.positives is not None
    assert np.nansum(layer.positives) == sum(counts)
    assert np.isnan(layer.positives[2:]).all()
    assert (0 in layer.positives) == bool(report.findings)


@pytest.mark.parametrize(("n", "found"), [(288, False), (320, True)])
def test_it_takes_300_values(n: int, found: bool) -> None:
    """With one position for each image, n images are n values."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU()).eval()
    assert isinstance(network[2], nn.BatchNorm1d)
    network[2].bias.data[0] = -50
    assert bool(health.diagnose(network, images(n, 32), select=["BN109"]).findings) == found


def test_it_takes_more_than_5_percent_of_the_channels() -> None:
    network = nn.Sequential(nn.Conv2d(3, 40, 3, bias=False), nn.BatchNorm2d(40), nn.ReLU()).eval()
    assert isinstance(network[1], nn.BatchNorm2d)
    network[1].bias.data[:2] = -50
    assert not health.diagnose(network, images(64, 32), select=["BN109"]).findings
    network[1].bias.data[:3] = -50
    assert health.diagnose(network, images(64, 32), select=["BN109"]).findings


def test_only_a_relu_blocks() -> None:
    network = with_dead(0, 1, 2)
    network.relu2 = nn.LeakyReLU()
    assert not health.diagnose(network, images(64, 32), select=["BN109"]).findings


def test_statistics_that_are_nan_do_not_make_channels_dead() -> None:
    network = with_dead(0, 1, 2)
    assert isinstance(network.bn1, nn.BatchNorm2d) and network.bn1.running_var is not None
    network.bn1.running_var.fill_(float("nan"))
    assert not health.diagnose(network, images(64, 32), select=["BN109"]).findings


def test_reads_what_the_monitor_of_a_training_gives() -> None:
    layer = LayerEvidence(
        name="bn", kind="BatchNorm2d", family="batch", channels=40, eps=1e-5, gamma_trained=True, dead=3
    )
    (finding,) = check(Evidence(layers={"bn": layer}))
    assert (finding.layers, finding.numbers["dead"], finding.numbers["values"]) == (("bn",), 3, None)
    assert not check(Evidence(layers={"bn": replace(layer, dead=2)}))
    assert not check(Evidence(layers={"bn": replace(layer, gamma_trained=False)}))
