"""Layers without running statistics."""

import torch
from torch import nn

from bnlab import health, norm
from tests.health.checks.networks import sound_network, teacher_batches


def test_finds_one_layer_without_statistics() -> None:
    network = sound_network()
    network[4] = nn.BatchNorm2d(8, track_running_stats=False)
    found = health.diagnose(network.eval(), teacher_batches(sound_network()))["no-running-statistics"]
    assert (found.id, found.severity, found.layers) == ("BN003", "error", ("4",))
    assert found.numbers == {"without": 1, "of": 2}


def test_warns_if_no_layer_has_statistics() -> None:
    network = sound_network()
    network[1], network[4] = (nn.BatchNorm2d(8, track_running_stats=False) for _ in range(2))
    found = health.diagnose(network.eval(), teacher_batches(sound_network()))["BN003"]
    assert (found.severity, found.layers) == ("warn", ("1", "4"))


def test_finds_statistics_that_are_not_updated() -> None:
    network = sound_network()
    network[4].track_running_stats = False
    found = health.diagnose(network, teacher_batches(sound_network()))["BN003"]
    assert (found.severity, found.layers) == ("warn", ("4",))
    network[4].reset_running_stats()  # does nothing without tracking
    network[4].running_mean.zero_()
    network[4].running_var.fill_(1)
    before = network[4].running_mean.clone()
    network.train()(torch.randn(8, 3, 8, 8))
    assert torch.equal(network[4].running_mean, before)  # what the finding says
    found = health.diagnose(network.eval(), teacher_batches(sound_network()))["BN003"]
    assert (found.severity, found.layers, found.numbers["initial"]) == ("error", ("4",), 1)


def test_is_silent_on_sound_frozen_and_instance_layers() -> None:
    batches = teacher_batches(sound_network())
    network = sound_network()
    assert "BN003" not in health.diagnose(network, batches)
    norm.freeze(network)
    assert "BN003" not in health.diagnose(network, batches)
    network[4] = nn.InstanceNorm2d(8)
    assert "BN003" not in health.diagnose(network, batches)


def test_is_silent_about_layers_that_are_never_reached() -> None:
    network = sound_network()
    network[1].extra = nn.BatchNorm2d(8, track_running_stats=False)
    assert "BN003" not in health.diagnose(network, teacher_batches(sound_network()))
