"""Two processes whose means are 1 and -1, and whose variances are 1: together, the mean is 0 and the variance 2."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from bnlab.health import Report, diagnose

Batch = tuple[Tensor, Tensor]


def network(mean: float, variance: float) -> nn.Sequential:
    """Class 1 where the first value is above the mean plus 1.2 standard deviations, by the layer."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2, bias=True)).eval()
    with torch.no_grad():
        model[0].running_mean.fill_(mean)
        model[0].running_var.fill_(variance)
        model[1].weight.zero_()
        model[1].weight[1, 0] = 1
        model[1].bias.copy_(torch.tensor([1.2, 0.0]))
    return model


def ranks(apart: float = 1.0) -> list[Mapping[str, Tensor]]:
    return [network(apart, 1.0).state_dict(), network(-apart, 1.0).state_dict()]


def batches() -> list[Batch]:
    """Of both processes; labels by the merged statistics."""
    torch.manual_seed(0)
    x = torch.randn(512, 4) + torch.tensor([1.0, -1.0]).repeat(256)[:, None]
    return [*zip(x.split(32), (x[:, 0] > 1.2 * math.sqrt(2)).long().split(32), strict=True)]


def diagnosed(model: nn.Module, states: list[Mapping[str, Tensor]]) -> Report:
    return diagnose(model, batches(), ranks=states, select=["BN015"])


def test_finds_that_variances_were_averaged_without_the_means() -> None:
    finding = diagnosed(network(0.0, 1.0), ranks())["BN015"]
    assert finding.severity == "warn"
    assert finding.layers == ("0",)
    assert finding.numbers == {
        "processes": 2,
        "off_share": 1,
        "mean_off": 0,
        "variance_off": pytest.approx(2, rel=1e-4),
    }
    assert "variances" in finding.cause
    assert finding.cost is not None
    assert finding.cost.after == 1.0
    assert finding.cost.before < 0.95


def test_finds_that_one_process_was_kept() -> None:
    finding = diagnosed(network(-1.0, 1.0), ranks())["BN015"]
    assert finding.cause == "the statistics of process 1 were kept alone"
    assert finding.numbers["mean_off"] == pytest.approx(1 / math.sqrt(2), rel=1e-4)


def test_is_silent_on_merged_statistics() -> None:
    assert "BN015" not in diagnosed(network(0.0, 2.0), ranks())


def test_is_silent_on_ranks_that_agree() -> None:
    assert "BN015" not in diagnosed(network(1.0, 1.0), [network(1.0, 1.0).state_dict()] * 2)


@pytest.mark.parametrize(("apart", "found"), [(0.49, False), (0.51, True)])
def test_the_variance_may_be_off_by_a_quarter(apart: float, found: bool) -> None:
    """Merged, the variance is 1 + apart^2: 1.2401 or 1.2601."""
    report = diagnose(network(0.0, 1.0), [x for x, _ in batches()], ranks=ranks(apart), select=["BN015"])
    assert ("BN015" in report) == found


def test_is_advice_where_it_costs_nothing() -> None:
    model = network(0.0, 1.0)
    given = [(x, model(x).argmax(1)) for x, _ in batches()]
    finding = diagnose(model, given, ranks=ranks(), select=["BN015"])["BN015"]
    assert finding.severity == "info"
    assert finding.cost is not None


def test_the_state_dicts_may_be_those_of_wrapped_models() -> None:
    wrapped = [{f"module._orig_mod.{key}": value for key, value in state.items()} for state in ranks()]
    assert "BN015" in diagnosed(network(0.0, 1.0), wrapped)


def test_without_other_processes_it_is_skipped() -> None:
    assert "ranks=" in diagnose(network(0.0, 1.0), batches(), select=["BN015"]).skipped["BN015"]
