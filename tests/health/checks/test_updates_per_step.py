"""How often the running statistics move for a step of the optimiser."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bnlab import health, norm
from tests.health.checks.networks import sound_network, teacher_batches

Step = Callable[[nn.Module, Any], None]
BATCHES = teacher_batches(sound_network(), batches=4, size=8)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def sgd_step(network: nn.Module, forwards: int = 1) -> Step:
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)

    def train_step(model: nn.Module, batch: Any) -> None:
        optimizer.zero_grad()
        sum(loss_of(model, batch) for _ in range(forwards)).backward()
        optimizer.step()

    return train_step


class Checkpointed(nn.Module):
    """Its first block is run again in backward."""

    def __init__(self, *, reentrant: bool = False, restore_count: bool = False) -> None:
        super().__init__()
        network = sound_network()
        self.block, self.rest = network[:6], network[6:]
        self.reentrant, self.restore_count = reentrant, restore_count

    def run(self, x: Tensor) -> Tensor:
        layers = [m for m in self.block if isinstance(m, nn.BatchNorm2d)]
        counts = [m.num_batches_tracked.clone() for m in layers]
        try:
            return self.block(x)
        finally:  # backward may end the forward as soon as it has what it needs
            if self.restore_count and torch._C._current_graph_task_id() != -1:
                for layer, count in zip(layers, counts, strict=True):
                    layer.num_batches_tracked.copy_(count)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.rest(self.block(x))
        return self.rest(checkpoint(self.run, x.detach().requires_grad_(), use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_finds_activation_checkpointing(reentrant: bool) -> None:
    network = Checkpointed(reentrant=reentrant).eval()
    found = health.diagnose(network, BATCHES, train_step=sgd_step(network))["updates-per-step"]
    assert (found.id, found.severity) == ("BN010", "warn")
    assert set(found.layers) == {"block.1", "block.4"}
    numbers = found.numbers
    assert (numbers["moves"], numbers["counted"], numbers["again"]) == (2, 2, 1)
    assert numbers["momentum_acts_as"] == pytest.approx(1 - 0.9**2)
    assert numbers["momentum_instead"] == pytest.approx(1 - 0.9**0.5)
    assert "checkpointing" in found.cause


def test_finds_it_where_the_counter_is_restored() -> None:
    network = Checkpointed(restore_count=True).eval()
    found = health.diagnose(network, BATCHES, train_step=sgd_step(network))["BN010"]
    assert "num_batches_tracked says 1" in found.message
    assert (found.numbers["moves"], found.numbers["counted"]) == (2, 1)


def test_is_silent_on_checkpointing_with_layers_that_do_not_move_then() -> None:
    network = Checkpointed()
    norm.convert(network)
    assert isinstance(network.block[1], norm.BatchNorm2d)
    assert "BN010" not in health.diagnose(network.eval(), BATCHES, train_step=sgd_step(network))


def test_finds_accumulated_gradients() -> None:
    network = sound_network()
    optimizer, calls = torch.optim.SGD(network.parameters(), 0.05), [0]

    def train_step(model: nn.Module, batch: Any) -> None:
        loss_of(model, batch).backward()
        calls[0] += 1
        if calls[0] % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()

    found = health.diagnose(network, BATCHES, train_step=train_step)["BN010"]
    assert (found.severity, found.layers) == ("info", ("1", "4"))
    numbers = found.numbers
    assert (numbers["moves"], numbers["normalised_together"], numbers["images_per_step"]) == (4, 8, 32)
    assert numbers["momentum_instead"] == pytest.approx(1 - 0.9**0.25)
    assert found.command == "with bnlab.norm.accumulate(model, 4): ..."
    assert calls[0] == 16  # four steps of the optimiser


def test_finds_an_extra_forward() -> None:
    network = sound_network()
    found = health.diagnose(network, BATCHES, train_step=sgd_step(network, forwards=2))["BN010"]
    assert (found.severity, found.numbers["moves"], found.numbers["forwards"]) == ("warn", 2, 2)
    assert found.cause == "more than one forward for a step, such as for another loss"


class SharpnessAware:
    """Sharpness-aware minimisation (Foret et al. 2021) around an optimiser."""

    def __init__(self, network: nn.Module, *, one_move: bool) -> None:
        self.network, self.one_move = network, one_move
        self.optimizer = torch.optim.SGD(network.parameters(), 0.05)

    def __call__(self, model: nn.Module, batch: Any) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer.zero_grad()
        loss_of(model, batch).backward()
        with torch.no_grad():
            ascent = [0.05 * p.grad / p.grad.norm().clamp(min=1e-12) for p in parameters if p.grad is not None]
            for p, by in zip(parameters, ascent, strict=True):
                p.add_(by)
        layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for layer in layers if self.one_move else ():
            layer.momentum = 0.0
        self.optimizer.zero_grad()
        loss_of(model, batch).backward()
        for layer in layers:
            layer.momentum = 0.1
        with torch.no_grad():
            for p, by in zip(parameters, ascent, strict=True):
                p.sub_(by)
        self.optimizer.step()


def test_finds_sharpness_aware_minimisation() -> None:
    network = sound_network()
    found = health.diagnose(network, BATCHES, train_step=SharpnessAware(network, one_move=False))["BN010"]
    assert (found.severity, found.numbers["moves"]) == ("warn", 2)
    assert "changed weights" in found.cause


def test_is_silent_if_the_second_forward_moves_nothing() -> None:
    """Although num_batches_tracked rises by two."""
    network = sound_network()
    report = health.diagnose(network, BATCHES, train_step=SharpnessAware(network, one_move=True))
    assert "BN010" not in report
    assert report.evidence.parts["train_step"].layers["1"].counted == 2


def test_is_silent_on_plain_steps() -> None:
    network = sound_network()
    assert "BN010" not in health.diagnose(network, BATCHES, train_step=sgd_step(network))


def test_is_silent_on_two_optimisers_of_one_network() -> None:
    network = sound_network()
    parts = torch.optim.SGD(network[:6].parameters(), 0.05), torch.optim.AdamW(network[6:].parameters())

    def train_step(model: nn.Module, batch: Any) -> None:
        loss_of(model, batch).backward()
        for optimizer in parts:
            optimizer.step()
            optimizer.zero_grad()

    assert "BN010" not in health.diagnose(network, BATCHES, train_step=train_step)


def test_is_silent_on_a_layer_that_each_forward_uses_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = sound_network()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.inner(x.flip(-1))

    network = Twice().eval()
    assert "BN010" not in health.diagnose(network, BATCHES, train_step=sgd_step(network))


def test_is_silent_on_frozen_layers_and_momentum_0() -> None:
    network = sound_network()
    network[1].momentum = 0.0
    network[4].eval()
    norm.freeze(network[4])
    assert "BN010" not in health.diagnose(network, BATCHES, train_step=sgd_step(network))


def test_counts_calls_where_no_optimiser_steps() -> None:
    network = sound_network()
    report = health.diagnose(network, BATCHES, train_step=lambda model, batch: loss_of(model, batch).backward())
    assert "BN010" not in report

    def twice(model: nn.Module, batch: Any) -> None:
        (loss_of(model, batch) + loss_of(model, batch)).backward()

    found = health.diagnose(network, BATCHES, train_step=twice)["BN010"]
    assert found.numbers["moves"] == 2
    assert "for each call of train_step" in found.message
