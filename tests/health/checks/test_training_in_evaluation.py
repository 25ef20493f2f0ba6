"""Modules in training mode where the model is evaluated."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab import health
from tests.health.checks.networks import sound_network, teacher_batches


def test_finds_a_layer_in_training_mode() -> None:
    network = sound_network()
    network[4].train()
    found = health.diagnose(network, teacher_batches(sound_network()))["training-in-evaluation"]
    assert (found.id, found.severity, found.layers) == ("BN002", "error", ("4",))
    # the proof, computed here in float64 by hand
    x = teacher_batches(sound_network())[0][0][:4].double()
    with torch.no_grad():
        network.double()
        whole, alone = network(x), torch.cat([network(one[None]) for one in x])
    expected = float((whole - alone).abs().max() / whole.std())
    assert expected > 0.1
    assert found.numbers["alone"] == pytest.approx(expected, rel=1e-6)
    assert found.numbers["again"] == 0


def test_finds_dropout_in_training_mode() -> None:
    network = sound_network(dropout=0.5)
    network[8].train()
    found = health.diagnose(network, teacher_batches(sound_network()))["BN002"]
    assert (found.severity, found.layers, found.numbers["modules"]) == ("warn", (), ["8 (Dropout)"])
    assert found.numbers["again"] > 0.01


def test_finds_dropout_whatever_the_mode() -> None:
    class MonteCarlo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = sound_network()

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.inner(x), 0.5)

    found = health.diagnose(MonteCarlo().eval(), teacher_batches(sound_network()))["BN002"]
    assert (found.severity, found.numbers["modules"]) == ("warn", [])
    assert found.command == "F.dropout(x, p, training=self.training)"


def test_finds_a_function_that_normalises_by_the_batch() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = sound_network()

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.inner(x), None, None, training=True)

    found = health.diagnose(Hidden().eval(), teacher_batches(sound_network()))["BN002"]
    assert (found.severity, found.numbers["modules"]) == ("warn", ["the model itself"])
    assert found.numbers["alone"] > 0.01


def test_finds_a_validation_in_training_mode() -> None:
    batches = teacher_batches(sound_network(), size=8)

    def validate(model: nn.Module) -> None:
        model[1].train()
        model(batches[0][0])
        model[1].eval()

    found = health.diagnose(sound_network(), batches, validate=validate)["BN002"]
    assert (found.severity, found.layers) == ("error", ("1",))

    def with_dropout(model: nn.Module) -> None:
        model.eval()[8].train()
        model(batches[0][0])

    found = health.diagnose(sound_network(dropout=0.1), batches, validate=with_dropout)["BN002"]
    assert (found.severity, found.numbers["modules"]) == ("warn", ["8 (Dropout)"])


def test_says_that_the_model_was_passed_in_training_mode() -> None:
    batches = teacher_batches(sound_network(), size=8)
    found = health.diagnose(sound_network().train(), batches)["BN002"]
    assert (found.severity, found.layers, found.command) == ("warn", ("1", "4"), "model.eval()")
    given = (
        {"train_step": lambda model, batch: model(batch[0])},
        {"validate": lambda model: model.eval()(batches[0][0])},
    )
    for more in given:  # then it may be meant
        assert "BN002" not in health.diagnose(sound_network().train(), batches, **more)
    without = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).train()
    assert "BN002" not in health.diagnose(without, batches)


def test_is_silent_on_a_sound_network() -> None:
    batches = teacher_batches(sound_network(), size=8)
    network = sound_network(dropout=0.5)
    network[2].train()  # a ReLU, to which the mode makes no difference
    network[5].train()
    assert "BN002" not in health.diagnose(network, batches, validate=lambda model: model(batches[0][0]))


def test_is_silent_where_only_rounding_differs() -> None:
    """Float32 outputs of an image alone and in a batch differ by rounding, far below 1e-3 standard deviations."""

    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = sound_network()

        def forward(self, x: Tensor) -> Tensor:
            assert x.dtype == torch.float32  # so that float64 does not work
            return self.inner(x)

    report = health.diagnose(Casts().eval(), teacher_batches(sound_network()))
    assert "BN002" not in report
    alone = report.evidence.parts["alone"]
    assert (alone.dtype, alone.limit) == ("float32", 1e-3)


def test_layers_without_statistics_are_left_to_their_own_check() -> None:
    network = sound_network()
    network[1] = nn.BatchNorm2d(8, track_running_stats=False)
    report = health.diagnose(network.eval(), teacher_batches(sound_network()))
    assert "BN002" not in report
    assert "BN003" in report


def test_a_function_is_not_blamed_for_a_layer_without_statistics() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = sound_network()
            self.inner[1] = nn.BatchNorm2d(8, track_running_stats=False)
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("var", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.inner(x), self.mean, self.var, training=self.training)

    report = health.diagnose(Both().eval(), teacher_batches(sound_network()))
    assert report.evidence.parts["alone"].depends_on_batch
    assert "BN002" not in report


def test_is_silent_about_layers_that_are_never_reached() -> None:
    network = sound_network()
    network[1].extra = nn.BatchNorm2d(8).train()
    assert "BN002" not in health.diagnose(network, teacher_batches(sound_network()))
