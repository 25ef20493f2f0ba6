"""A batch of B independent values is worth B of them, however many copies of each there are."""

import pytest
import torch
from torch import Tensor, nn

from bnlab.health import diagnose
from bnlab.health.checks.small_effective_batch import check
from bnlab.health.evidence import Evidence, LayerEvidence
from bnlab.norm import freeze

CHANNELS = 64


def batches(size: int, number: int = 40, positions: int = 1, copies: int = 1, seed: int = 0) -> list[Tensor]:
    """Independent values, N x C x positions, each of them several times."""
    torch.manual_seed(seed)
    return [torch.randn(size, CHANNELS, positions).repeat(1, 1, copies) for _ in range(number)]


def network() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(CHANNELS)).eval()


def test_finds_small_batches() -> None:
    finding = diagnose(network(), batches(8), select=["BN103"])["BN103"]
    assert finding.severity == "warn"
    assert finding.layers == ("0",)
    assert finding.numbers["effective_batch"] == pytest.approx(8, rel=0.1)
    assert finding.numbers["effective_batch"] < finding.numbers["at_most"] < 9.5


def test_is_silent_on_large_batches() -> None:
    assert "BN103" not in diagnose(network(), batches(64, number=16), select=["BN103"])


def test_copies_of_a_value_count_once_and_other_positions_count() -> None:
    found = diagnose(network(), batches(8, copies=8), select=["small-effective-batch"])["BN103"]
    assert found.numbers["effective_batch"] == pytest.approx(8, rel=0.1)
    assert "BN103" not in diagnose(network(), batches(8, positions=8), select=["BN103"])


@pytest.mark.parametrize("seed", range(5))
def test_is_silent_on_a_head_of_32_images(seed: int) -> None:
    """Its N_eff is 32 but for chance, which puts the interval below 32 now and then."""
    assert "BN103" not in diagnose(network(), batches(32, number=32, seed=seed), select=["BN103"])


def test_is_silent_on_32_images_that_are_alike() -> None:
    """Pairs of equal images are worth half, which is a fault of the order (BN105), not of the size."""
    given = [x.repeat(2, 1, 1) for x in batches(16)]
    assert "BN103" not in diagnose(network(), given, select=["BN103"])


def test_fewer_than_eight_batches_are_too_few() -> None:
    assert "eight" in diagnose(network(), batches(8, number=7), select=["BN103"]).skipped["BN103"]
    assert "BN103" in diagnose(network(), batches(8, number=8), select=["BN103"])


def test_layers_with_other_batches_in_training_are_left_out() -> None:
    frozen = network()
    freeze(frozen)
    synchronised = nn.Sequential(nn.SyncBatchNorm(CHANNELS)).eval()
    for model in (frozen, synchronised):
        assert "BN103" not in diagnose(model, batches(8), select=["BN103"])


def test_batches_sorted_by_class_say_nothing_of_those_in_training() -> None:
    given = [(x, torch.full((8,), i // 10)) for i, x in enumerate(batches(8))]
    model = nn.Sequential(*network(), nn.Flatten(), nn.Linear(CHANNELS, 4)).eval()
    assert "BN103" not in diagnose(model, given, select=["BN103"])


@pytest.mark.parametrize(("at_most", "sampled", "found"), [(31.9, 8, True), (32.0, 8, False), (31.9, 7, False)])
def test_what_the_monitor_of_a_training_measured(at_most: float, sampled: int, found: bool) -> None:
    layer = LayerEvidence(
        name="bn",
        kind="BatchNorm2d",
        family="batch",
        channels=4,
        eps=1e-5,
        effective_batch=20.0,
        effective_batch_at_most=at_most,
        sampled=sampled,
    )
    evidence = Evidence(layers={"bn": layer})
    assert evidence.has("effective_batch") == (sampled >= 8)
    findings = check(evidence)
    assert len(findings) == found
    assert all(finding.numbers == {"effective_batch": 20.0, "at_most": at_most, "batches": 8} for finding in findings)
