import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bnlab import health, norm
from bnlab.errors import UsageError
from bnlab.health.report import Report
from tests.health.checks.networks import sound_network, teacher_batches


def averaged_network(factor: float, **options: bool) -> tuple[nn.Sequential, AveragedModel]:
    """A network, and one with the same buffers whose weights before normalisation are so many times as large."""
    raw = sound_network()
    averaged = AveragedModel(raw, **options)
    averaged.update_parameters(raw)
    with torch.no_grad():
        for index in (0, 3):
            averaged.module[index].weight.mul_(factor)
    return raw, averaged.eval()


def diagnosed(raw: nn.Module, averaged: nn.Module, labels: bool = True) -> Report:
    batches = teacher_batches(sound_network(), batches=16)
    return health.diagnose(raw, batches if labels else [x for x, _ in batches], averaged=averaged)


def test_finds_copied_statistics_and_their_cost() -> None:
    raw, averaged = averaged_network(4)
    found = diagnosed(raw, averaged)["BN017"]
    assert found.severity == "warn"
    assert set(found.layers) == {"1", "4"}
    # a layer after normalisation does not see the scale of the weights before it: recalibrated, both are the same
    assert found.numbers["raw"] == 1.0
    assert found.numbers["recalibrated"] > 0.95
    assert found.numbers["averaged"] < 0.8
    assert found.cost is not None
    assert (found.cost.before, found.cost.after) == (found.numbers["averaged"], found.numbers["recalibrated"])
    assert found.numbers["averaged_weights"] == 1
    assert found.numbers["off_share"] == 1.0
    assert "copies" in found.cause


def test_finds_it_without_labels() -> None:
    found = diagnosed(*averaged_network(4), labels=False)["BN017"]
    assert found.cost is None
    assert set(found.layers) == {"1", "4"}


@pytest.mark.parametrize("wrapped", [True, False])
def test_finds_initial_statistics(wrapped: bool) -> None:
    raw, averaged = averaged_network(4)
    for layer in (averaged.module[1], averaged.module[4]):
        layer.reset_running_stats()
    assert "initial" in diagnosed(raw, averaged if wrapped else averaged.module)["BN017"].cause


def test_is_silent_once_recalibrated_and_restores_the_model() -> None:
    raw, averaged = averaged_network(4)
    norm.recalibrate(averaged, [x for x, _ in teacher_batches(raw, batches=16)])
    averaged.train()
    before = copy.deepcopy(averaged.state_dict())
    assert "BN017" not in diagnosed(raw, averaged)
    assert averaged.module[1].training
    assert all(torch.equal(value, before[key]) for key, value in averaged.state_dict().items())


def test_is_silent_where_the_average_is_near() -> None:
    assert "BN017" not in diagnosed(*averaged_network(1))
    assert "BN017" not in diagnosed(*averaged_network(1.02))


def test_is_silent_where_it_costs_nothing() -> None:
    raw, averaged = averaged_network(4)
    batches = teacher_batches(raw, batches=16)
    report = health.diagnose(raw, batches, averaged=averaged, metric=lambda output, batch: torch.ones(len(output)))
    assert "BN017" not in report


def test_without_an_averaged_model_it_is_skipped() -> None:
    network = sound_network()
    report = health.diagnose(network, teacher_batches(network))
    assert "averaged=" in report.skipped["BN017"]


def test_what_is_no_model_or_fails_is_said() -> None:
    raw = sound_network()
    batches = teacher_batches(raw)
    with pytest.raises(UsageError, match="averaged is of the type dict"):
        health.diagnose(raw, batches, averaged={})  # type: ignore[arg-type]
    report = health.diagnose(raw, batches, averaged=nn.Linear(5, 5))
    assert any("the averaged model cannot be run" in note for note in report.notes)
