"""Synchronised layers in one process; test_processes.py has those in two."""

import pytest
import torch
from torch import nn

from bnlab import norm
from bnlab.health import diagnose
from bnlab.health.checks.sync_misuse import check
from bnlab.health.evidence import Evidence
from bnlab.health.gather.processes import Sync


@pytest.mark.parametrize("layer", [nn.SyncBatchNorm, norm.SyncBatchNorm])
def test_finds_synchronised_layers_in_one_process(layer: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer(4), nn.BatchNorm2d(4)).eval()
    finding = diagnose(model, [torch.randn(8, 3, 4, 4)], select=["BN016"])["BN016"]
    assert finding.severity == "info"
    assert finding.layers == ("1",)


def test_is_silent_on_plain_layers_and_on_converted_ones() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).eval()
    norm.revert_sync(model)  # what the finding advises
    report = diagnose(model, [torch.randn(8, 3, 4, 4)], select=["BN016"])
    assert "BN016" not in report
    assert report.skipped["BN016"] == "it needs synchronised layers"


def evidence(device: str, calls: tuple[int, int], batches: tuple[int, int], refuse: bool = True) -> Evidence:
    sync = Sync(
        layers=("bn",),
        refuse_cpu=("bn",) if refuse else (),
        device=device,
        processes=2,
        calls=tuple({"bn": number} for number in calls),
        batches=batches,
    )
    return Evidence(layers={}, parts={"sync": sync})


@pytest.mark.parametrize(
    ("given", "severities"),
    [
        (evidence("cuda", (1, 1), (4, 4)), []),
        (evidence("cpu", (1, 1), (4, 4), refuse=False), []),
        (evidence("cpu", (1, 1), (4, 4)), ["warn"]),
        (evidence("cuda", (1, 2), (4, 4)), ["error"]),
        (evidence("cuda", (1, 1), (4, 3)), ["error"]),
    ],
    ids=["sound", "sound on the CPU", "refused", "calls", "batches"],
)
def test_what_two_processes_found(given: Evidence, severities: list[str]) -> None:
    assert [finding.severity for finding in check(given)] == severities
