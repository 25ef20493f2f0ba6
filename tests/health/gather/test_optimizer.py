"""What an optimiser does to the parameters of a network."""

from typing import Any

import torch
from torch import nn

from bnlab import health
from bnlab.health.gather.optimizer import OptimizerEvidence


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)).eval()


def diagnosed(model: nn.Module, optimizer: Any) -> health.Report:
    return health.diagnose(model, [torch.randn(8, 3, 6, 6)], optimizer=optimizer, select=["BN014"])


def part(model: nn.Module, optimizer: Any) -> OptimizerEvidence:
    return diagnosed(model, optimizer).evidence.part("optimizer", OptimizerEvidence)


def test_reads_the_decay_of_each_group() -> None:
    model = network()
    groups = [{"params": [model[1].weight], "weight_decay": 0.5}, {"params": [model[1].bias], "weight_decay": 0.0}]
    found = part(model, torch.optim.SGD(groups, lr=0.1))
    assert found.kind == "SGD"
    assert found.decay == {"1": {"weight": 0.5, "bias": 0.0}}
    assert found.missing == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert (found.shared, found.foreign) == (2, 0)


def test_parameters_without_a_gradient_are_not_missed() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([*model[1].parameters(), nn.Parameter(torch.zeros(1))], lr=0.1)
    found = part(model, optimizer)
    assert found.missing == ("2.weight", "2.bias")
    assert (found.shared, found.foreign) == (2, 1)


def test_an_optimiser_without_groups_is_noted() -> None:
    report = diagnosed(network(), object())
    assert "BN014" in report.skipped
    assert any("AttributeError" in note for note in report.notes)
