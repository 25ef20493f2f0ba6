"""Steps of the training are counted, and undone."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from bnlab import health
from tests.health.checks.networks import sound_network, teacher_batches
from tests.health.gather.test_modes import assert_same, snapshot

BATCHES = teacher_batches(sound_network(), batches=3, size=8)


class Training:
    """A network, its optimiser and a parameter outside of the network, after a first step."""

    def __init__(self) -> None:
        self.network = sound_network(dropout=0.1)
        self.scale = nn.Parameter(torch.ones(()))
        self.optimizer = torch.optim.AdamW([*self.network.parameters(), self.scale], 0.01)
        self.error: BaseException | None = None
        self.batches: list[Any] = []
        self.step(self.network.train(), BATCHES[0])
        self.network.eval()
        self.batches.clear()

    def step(self, model: nn.Module, batch: Any) -> None:
        self.batches.append(batch)
        self.optimizer.zero_grad(set_to_none=False)
        (F.cross_entropy(model(batch[0]), batch[1]) * self.scale).backward()
        self.optimizer.step()
        self.optimizer.param_groups[0]["lr"] *= 0.5
        batch[0].zero_()
        random.random()
        np.random.rand()
        if self.error is not None and len(self.batches) == 2:
            raise self.error

    def state(self) -> tuple[Any, ...]:
        inner = self.optimizer.state_dict()["state"]
        tensors = [value.clone() for values in inner.values() for value in values.values()]
        gradients = [p.grad.clone() for p in self.network.parameters() if p.grad is not None]
        numbers = self.optimizer.param_groups[0]["lr"], random.getstate(), str(np.random.get_state())
        return [*tensors, *gradients, self.scale.detach().clone()], numbers


@pytest.mark.parametrize("passed", [True, False], ids=["optimizer passed", "optimizer not passed"])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_everything_is_undone(passed: bool, error: type[BaseException] | None) -> None:
    training = Training()
    images = [x.clone() for x, _ in BATCHES]
    before, state = snapshot(training.network), training.state()
    given = {"optimizer": training.optimizer} if passed else {}
    if error is None:
        health.diagnose(training.network, BATCHES, train_step=training.step, **given)
        assert len(training.batches) == 4
    else:
        training.error = error("by the caller")
        with pytest.raises(error) as caught:
            health.diagnose(training.network, BATCHES, train_step=training.step, **given)
        assert caught.value is training.error
        assert len(training.batches) == 2
    assert_same(training.network, before)
    tensors, numbers = training.state()
    assert all(torch.equal(one, other) for one, other in zip(tensors, state[0], strict=True))
    assert numbers == state[1]
    assert all(torch.equal(x, image) for (x, _), image in zip(BATCHES, images, strict=True))
    assert not _global_optimizer_pre_hooks
    assert not _global_optimizer_post_hooks


def test_the_step_gets_batches_as_they_came_and_a_model_in_training_mode() -> None:
    batches = [{"image": x, "label": y, "name": ["a"] * len(x)} for x, y in BATCHES]
    seen: list[tuple[bool, list[str]]] = []

    def train_step(model: nn.Module, batch: Any) -> None:
        seen.append((model.training, [*batch]))
        model(batch["image"])

    health.diagnose(
        sound_network(), batches, train_step=train_step, forward=lambda model, batch: model(batch["image"]), images=None
    )
    assert seen[0] == (True, ["image", "label", "name"])


def test_modes_remain_if_the_model_was_passed_in_training_mode() -> None:
    network = sound_network().train()
    network[1].eval()
    steps = health.diagnose(network, BATCHES, train_step=lambda model, batch: model(batch[0])).evidence.parts[
        "training"
    ]
    assert ([*steps.layers], steps.evaluated) == (["4"], ("1",))


def test_a_scaler_that_leaves_out_steps_is_not_accumulation() -> None:
    network, calls = sound_network(), [0]
    optimizer = torch.optim.SGD(network.parameters(), 0.1)

    def train_step(model: nn.Module, batch: Any) -> None:
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        calls[0] += 1
        if calls[0] > 2:  # the first two gradients were infinite
            optimizer.step()

    report = health.diagnose(network, BATCHES, train_step=train_step)
    steps = report.evidence.parts["train_step"]
    assert (steps.calls, steps.layers["1"].moves, steps.optimizer_steps) == (1, 1, 4)


def test_moves_that_are_undone_within_the_step_do_not_count() -> None:
    network = sound_network()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)

    def train_step(model: nn.Module, batch: Any) -> None:
        kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with torch.no_grad():
            model(batch[0] + 1)  # of another loss
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    report = health.diagnose(network, BATCHES, train_step=train_step)
    counts = report.evidence.parts["train_step"].layers["4"]
    assert (counts.forwards, counts.moves, counts.counted) == (2, 1, 1)
    assert "BN010" not in report


def test_a_batch_that_is_split_within_the_step_is_accumulation() -> None:
    network = sound_network()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)

    def train_step(model: nn.Module, batch: Any) -> None:
        for x, y in zip(batch[0].split(4), batch[1].split(4), strict=True):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()

    found = health.diagnose(network, BATCHES, train_step=train_step)["BN010"]
    assert found.severity == "info"
    assert (found.numbers["normalised_together"], found.numbers["images_per_step"]) == (4, 8)


def test_steps_of_another_network_do_not_count() -> None:
    network, other = sound_network(), sound_network(1)
    optimizers = [torch.optim.SGD(n.parameters(), 0.1) for n in (network, other)]

    def train_step(model: nn.Module, batch: Any) -> None:
        for n, optimizer in zip((model, other), optimizers, strict=True):
            F.cross_entropy(n(batch[0]), batch[1]).backward()
            optimizer.step()

    before = other[0].weight.detach().clone()
    report = health.diagnose(network, BATCHES, train_step=train_step)
    assert report.evidence.parts["train_step"].optimizer_steps == 4
    assert torch.equal(other[0].weight, before)


def test_a_model_that_cannot_be_trained_is_said_so() -> None:
    class EvaluationOnly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = sound_network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                raise RuntimeError("targets are missing")
            return self.inner(x)

    report = health.diagnose(EvaluationOnly().eval(), BATCHES)
    assert report.skipped["BN004"] == "it needs a model that runs in training mode"
    assert "the model cannot be run in training mode (RuntimeError: targets are missing)" in report.notes
