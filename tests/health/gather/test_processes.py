"""Two processes that diagnose (gloo, on the CPU), and what the caller may pass in their place."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnlab.errors import UsageError
from bnlab.health import diagnose
from bnlab.health.gather import processes
from bnlab.norm import SyncBatchNorm
from tests.two_processes import run_scenes

Found = dict[str, Any]


def network(mean: float = 0.0, layer: Callable[[int], nn.Module] = nn.BatchNorm1d) -> nn.Sequential:
    model = nn.Sequential(layer(4), nn.Linear(4, 2)).eval()
    model[0].running_mean.fill_(mean)  # type: ignore[union-attr, operator]
    return model


def images(batches: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 4, generator=generator) for _ in range(batches)]


def found(model: nn.Module, batches: int = 3) -> Found:
    report = diagnose(model, images(batches), select=["BN015", "BN016"])
    findings = [(f.id, f.severity, f.numbers, [*f.layers]) for f in report.findings]
    return {"findings": findings, "skipped": dict(report.skipped), "notes": [*report.notes]}


def differ(rank: int) -> Found:
    """Means of -1 and 1, with variances of 1: merged, the mean is 0 and the variance 2."""
    return found(network(2.0 * rank - 1))


def alone(rank: int) -> Found:
    """The second process makes no diagnosis, and the first goes on after a while; its layers would wait in training."""
    processes.WAIT = timedelta(seconds=0.2)
    result = found(network(layer=SyncBatchNorm)) if rank == 0 else {}
    processes.WAIT = timedelta(seconds=60)
    dist.barrier()
    return result


def unequal_lengths(rank: int) -> Found:
    return found(network(layer=SyncBatchNorm), batches=3 - rank)


class Branch(nn.Module):
    """A forward that calls its layer twice in one of the processes."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.bn, self.calls = SyncBatchNorm(4), calls

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = self.bn(x)
        return x


processes.WAIT = timedelta(seconds=60)  # on a busy machine
SCENES: dict[str, Callable[[int], Found]] = {
    "alone": alone,
    "differ": differ,
    "agree": lambda rank: found(network(1.0)),
    "lengths": unequal_lengths,
    "calls": lambda rank: found(Branch(1 + rank).eval()),
    "of torch": lambda rank: found(network(layer=nn.SyncBatchNorm)),
    "sound": lambda rank: found(network(layer=SyncBatchNorm)),
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found]:
    """What each of two processes found in each scene."""
    return run_scenes(__name__, Path(tmp_path_factory.mktemp("processes")))


@pytest.mark.slow
def test_statistics_that_differ_are_found_in_both_processes(scenes: tuple[Found, Found]) -> None:
    for process in scenes:
        ((check, severity, numbers, layers),) = process["differ"]["findings"]
        assert (check, severity, layers) == ("BN015", "warn", ["0"])
        assert numbers["processes"] == 2
        assert numbers["mean_off"] == pytest.approx(2**-0.5, rel=1e-4)
        assert numbers["variance_off"] == pytest.approx(2, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("scene", ["agree", "sound"])
def test_processes_that_agree_have_no_findings(scenes: tuple[Found, Found], scene: str) -> None:
    for process in scenes:
        assert process[scene]["findings"] == []
        assert "BN015" not in process[scene]["skipped"]


@pytest.mark.slow
def test_a_process_does_not_wait_for_ever(scenes: tuple[Found, Found]) -> None:
    assert "BN015" in scenes[0]["alone"]["skipped"]
    assert any("within 0.2 seconds" in note for note in scenes[0]["alone"]["notes"])
    assert any("not run in training mode" in note for note in scenes[0]["alone"]["notes"])


@pytest.mark.slow
@pytest.mark.parametrize(("scene", "numbers"), [("lengths", {"batches": [3, 2]}), ("calls", {"calls": [1, 2]})])
def test_processes_that_would_wait_for_each_other(
    scenes: tuple[Found, Found], scene: str, numbers: Mapping[str, Any]
) -> None:
    for process in scenes:
        ((check, severity, measured, _),) = process[scene]["findings"]
        assert (check, severity, measured) == ("BN016", "error", numbers)


@pytest.mark.slow
def test_layers_of_torch_refuse_the_cpu(scenes: tuple[Found, Found]) -> None:
    for process in scenes:
        assert [(check, severity) for check, severity, *_ in process["of torch"]["findings"]] == [("BN016", "warn")]


@pytest.mark.parametrize(
    ("ranks", "problem"),
    [
        ([network().state_dict()], "ranks has 1 state_dict"),
        (network().state_dict(), "ranks has one state_dict"),
        ([network().state_dict(), {}], r"ranks\[1\]: 0.running_mean is not there"),
        ([{"0.running_mean": torch.zeros(3)}] * 2, r"ranks\[0\]: 0.running_mean is of shape \[3\]"),
    ],
    ids=["one", "no list", "empty", "another shape"],
)
def test_state_dicts_that_do_not_fit_are_refused(ranks: Any, problem: str) -> None:
    with pytest.raises(UsageError, match=f"^{problem}"):
        diagnose(network(), images(), ranks=ranks)


@pytest.mark.parametrize(
    ("devices", "training", "noted"), [([0, 1], True, True), ([0], True, False), ([0, 1], False, False)]
)
def test_data_parallel_in_training_is_noted(devices: list[int], training: bool, noted: bool) -> None:
    model = nn.DataParallel(network())
    model.device_ids = devices  # of the diagnosis, only the note looks at them
    report = diagnose(model.train(training), images(), select=["BN015"])
    assert any("DataParallel" in note for note in report.notes) == noted
