"""Validations that write buffers."""

from typing import Any

import pytest
import torch
from torch import nn

from bnlab import health
from tests.health.checks.networks import sound_network, teacher_batches

BATCHES = teacher_batches(sound_network(), batches=3, size=8)


def test_finds_a_validation_in_training_mode() -> None:
    network = sound_network()

    def validate(model: nn.Module) -> None:
        model.train()
        for x, _ in BATCHES:
            model(x)

    before = {key: value.clone() for key, value in network.state_dict().items()}
    found = health.diagnose(network, BATCHES, validate=validate)["validation-moves-statistics"]
    assert (found.id, found.severity, set(found.layers)) == ("BN012", "error", {"1", "4"})
    assert found.numbers["batches"] == 3
    state = network.state_dict()
    assert all(torch.equal(state[key], before[key]) for key in before)
    validate(network)
    std = (before["1.running_var"] + 1e-5).sqrt(), (before["4.running_var"] + 1e-5).sqrt()
    moved = [
        float(((network[i].running_mean - before[f"{i}.running_mean"]).abs() / s).max())
        for i, s in zip((1, 4), std, strict=True)
    ]
    assert found.numbers["mean_moved"] == pytest.approx(max(moved), rel=1e-4)
    assert found.layers[0] == ("1", "4")[moved.index(max(moved))]


def test_finds_a_counter_that_moves_alone() -> None:
    found = health.diagnose(sound_network(), BATCHES, validate=lambda model: model[1].num_batches_tracked.add_(2))
    assert found["BN012"].layers == ("1",)
    assert (found["BN012"].numbers["batches"], found["BN012"].numbers["mean_moved"]) == (2, 0)


def test_is_silent_on_a_validation_in_evaluation_mode() -> None:
    def validate(model: Any) -> None:
        model.eval()
        for x, _ in BATCHES:
            model(x)

    network = sound_network()
    network[4].running_mean[0] = torch.nan  # which is not a change
    assert "BN012" not in health.diagnose(network, BATCHES, validate=validate)
    assert "BN012" not in health.diagnose(network.train(), BATCHES, validate=validate)
    assert "BN012" in health.diagnose(network, BATCHES).skipped
