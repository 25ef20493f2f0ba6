"""Frozen weights with running statistics that move."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bnlab import health, norm
from tests.health.checks.networks import sound_network, teacher_batches


def frozen_backbone() -> nn.Sequential:
    """Only the last layer is trained."""
    network = sound_network()
    network.requires_grad_(False)
    network[9].requires_grad_(True)
    return network


def step_for(network: nn.Module, mode: bool | None = None) -> Any:
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.1)

    def train_step(model: nn.Module, batch: Any) -> None:
        if mode is not None:
            model.train(mode)
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    return train_step


def test_finds_statistics_that_move_by_a_forward() -> None:
    network = frozen_backbone()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    found = health.diagnose(network, teacher_batches(sound_network()))["frozen-but-moving"]
    assert (found.id, found.severity, found.layers) == ("BN004", "warn", ("1", "4"))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_finds_statistics_that_move_in_a_training_step() -> None:
    network = frozen_backbone()
    found = health.diagnose(network, teacher_batches(sound_network()), train_step=step_for(network))["BN004"]
    assert found.layers == ("1", "4")


def test_is_silent_if_the_step_keeps_them_in_evaluation() -> None:
    network = frozen_backbone()
    step = step_for(network, mode=False)
    assert "BN004" not in health.diagnose(network, teacher_batches(sound_network()), train_step=step)


def test_is_silent_on_frozen_layers() -> None:
    network = frozen_backbone()
    norm.freeze(network)
    assert "BN004" not in health.diagnose(network, teacher_batches(sound_network()))


def test_is_silent_if_all_or_nothing_is_trained() -> None:
    batches = teacher_batches(sound_network())
    assert "BN004" not in health.diagnose(sound_network(), batches)
    assert "BN004" not in health.diagnose(sound_network().requires_grad_(False), batches)


def test_is_silent_if_beta_is_trained_or_nothing_could_be() -> None:
    network = frozen_backbone()
    network[1].bias.requires_grad_(True)
    network[4].register_parameter("weight", None)
    network[4].register_parameter("bias", None)
    assert "BN004" not in health.diagnose(network, teacher_batches(sound_network()))
