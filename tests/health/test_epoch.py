"""What an epoch of a training measured: when the checks report, and what their messages hold."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from bnlab.health.check import Finding
from bnlab.health.epoch import Health, LayerHealth
from bnlab.health.evidence import Scores

SOUND = LayerHealth(
    name="conv1.bn",
    channels=40,
    trained=True,
    momentum=0.1,
    batches=64,
    initial=0.0,
    mean_off=0.05,
    variance_off=1.1,
    off_share=0.0,
    effective_batch=500.0,
    effective_batch_at_most=600.0,
    dead=0,
    gamma_near_zero=0,
)
STALE: dict[str, Any] = {"mean_off": 0.42, "variance_off": 2.5, "off_share": 0.75}


def scores(running: float, population: float = 0.9, photos: int = 1000) -> Scores:
    """Of photos in an order in which the better way is right wherever the worse one is."""
    rank = np.arange(photos) / photos
    return Scores(running=(rank < running).astype(float), population=(rank < population).astype(float))


COSTLY = scores(0.8)


def findings(*, cost: Scores | None = COSTLY, **changes: Any) -> list[Finding]:
    return Health(layers=(SOUND, replace(SOUND, name="conv2.bn", **changes)), scores=cost).findings()


def only(*, cost: Scores | None = COSTLY, **changes: Any) -> Finding:
    (finding,) = findings(cost=cost, **changes)
    return finding


def test_a_sound_network_has_no_findings() -> None:
    assert findings() == []
    assert Health().findings() == []


@pytest.mark.parametrize(
    ("changes", "code", "parts"),
    [
        (
            STALE,
            "BN102",
            ["80.0% instead of 90.0% on 1,000 images", "75% of the channels", "0.42 standard", "2.5", "best.safe",
             "raise norm_momentum or lower learning_rate"],
        ),
        (
            STALE | {"updates": 1054, "momentum": 1e-4},
            "BN102",
            ["initial statistics still weigh 90%", "momentum 0.0001 is small for 1054 batches", "raise norm_momentum"],
        ),
        (
            {"effective_batch": 8.0, "effective_batch_at_most": 31.0},
            "BN103",
            ["fewer than 32 independent values", "8.0, at most 31.0, over 64", "batch_size", "norm=sync"],
        ),
        ({"dead": 3}, "BN109", ["3 in all", "3 of 40", "learning_rate", "activation=leaky_relu"]),
        ({"gamma_near_zero": 3}, "BN110", ["3 near zero", "of 40", "width"]),
    ],
)  # fmt: skip
def test_a_finding_names_the_layer_the_numbers_and_the_remedy(
    changes: dict[str, Any], code: str, parts: list[str]
) -> None:
    finding = only(**changes)
    assert finding.id == code
    for part in ["1 of 2 layers", "conv2.bn", *parts]:
        assert part in str(finding)
    assert str(finding).startswith(f"{code} {finding.name}: ")


@pytest.mark.parametrize(
    "changes",
    [
        STALE | {"off_share": 0.5},
        STALE | {"cost": None},
        STALE | {"cost": scores(0.895)},
        STALE | {"cost": scores(0.8, photos=60)},
        STALE | {"cost": scores(0.95)},
        {"mean_off": None, "variance_off": None, "off_share": None},
        {"effective_batch": 8.0, "effective_batch_at_most": 33.0},
        {"effective_batch": 8.0, "effective_batch_at_most": 9.0, "batches": 7},
        {"effective_batch": None, "effective_batch_at_most": None},
        {"dead": 2, "gamma_near_zero": 2},
        {"dead": 40, "gamma_near_zero": 40, "trained": False},
    ],
)
def test_below_a_threshold_nothing_is_reported(changes: dict[str, Any]) -> None:
    assert findings(**changes) == []


def test_all_checks_report_at_once() -> None:
    found = findings(**STALE, effective_batch=8.0, effective_batch_at_most=9.0, dead=40, gamma_near_zero=40)
    assert [finding.id for finding in found] == ["BN102", "BN103", "BN109", "BN110"]


def test_table_and_totals() -> None:
    second = replace(SOUND, channels=120, mean_off=0.5, variance_off=3.0, off_share=1.0, effective_batch=20.0, dead=16)
    health = Health(layers=(SOUND, second))
    columns, rows = health.table()
    assert {*columns} == {field.name for field in fields(LayerHealth)} - {"updates"}
    assert [row[columns.index("dead")] for row in rows] == [0, 16]
    assert health.scalars() == {
        "norm_mean_off_worst": 0.5,
        "norm_mean_off_median": pytest.approx(0.275),
        "norm_variance_off_worst": 3.0,
        "norm_variance_off_median": pytest.approx(2.05),
        "norm_off_share": 0.75,
        "norm_effective_batch_smallest": 20.0,
        "norm_dead_share": 0.1,
        "norm_gamma_near_zero_share": 0.0,
    }
    unmeasured = replace(SOUND, mean_off=None, variance_off=None, off_share=None, effective_batch=None)
    assert set(Health(layers=(unmeasured,)).scalars()) == {"norm_dead_share", "norm_gamma_near_zero_share"}
    assert Health().scalars() == {}
