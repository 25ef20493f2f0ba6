"""Layers that are frozen by their mode."""

from torch import Tensor, nn

from bnlab import health, norm
from tests.health.checks.networks import sound_network, teacher_batches


def frozen_by_mode() -> nn.Sequential:
    network = sound_network().train()
    network[1].eval()
    return network


def test_finds_what_train_undoes() -> None:
    network = frozen_by_mode()
    found = health.diagnose(network, teacher_batches(sound_network()))["train-unfreezes"]
    assert (found.id, found.severity, found.layers) == ("BN005", "warn", ("1",))
    assert [network[1].training, network[4].training, network.training] == [False, True, True]


def test_is_advice_if_the_step_keeps_them_frozen() -> None:
    batches = teacher_batches(sound_network())
    report = health.diagnose(frozen_by_mode(), batches, train_step=lambda model, batch: model(batch[0]))
    assert report["BN005"].severity == "info"
    report = health.diagnose(frozen_by_mode(), batches, train_step=lambda model, batch: model.train()(batch[0]))
    assert report["BN005"].severity == "warn"


def test_is_silent_on_frozen_layers() -> None:
    network = sound_network().train()
    norm.freeze(network)
    assert "BN005" not in health.diagnose(network, teacher_batches(sound_network()))


def test_is_silent_if_the_model_sets_them_to_evaluation_itself() -> None:
    class Holding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = sound_network()

        def train(self, mode: bool = True) -> "Holding":
            super().train(mode)
            self.inner[1].eval()
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    assert "BN005" not in health.diagnose(Holding().train(), teacher_batches(sound_network()))


def test_is_silent_on_a_model_in_one_mode() -> None:
    batches = teacher_batches(sound_network())
    assert "BN005" not in health.diagnose(sound_network().train(), batches)
    assert "BN005" in health.diagnose(sound_network(), batches).skipped
