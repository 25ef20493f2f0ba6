"""The checks: when each reports, what its message holds, and its section in docs/checks.md."""

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnlab.health.findings import Finding, Health, LayerHealth, StatisticsCost

DOCS = Path(__file__).parents[2] / "docs" / "checks.md"

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
COSTLY = StatisticsCost(photos=1000, running_top1=0.8, population_top1=0.9, p_value=1e-6)


def findings(*, cost: StatisticsCost | None = COSTLY, **changes: Any) -> list[Finding]:
    return Health(layers=(SOUND, replace(SOUND, name="conv2.bn", **changes)), cost=cost).findings()


def only(*, cost: StatisticsCost | None = COSTLY, **changes: Any) -> Finding:
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
            ["80.0% instead of 90.0% on 1,000 photos", "75% of its channels", "0.42 and 2.5", "best.safetensors",
             "raise norm_momentum or lower learning_rate"],
        ),
        (
            STALE | {"initial": 0.9, "momentum": 1e-4},
            "BN102",
            ["initial statistics still weigh 90%", "norm_momentum 0.0001 is small", "raise norm_momentum"],
        ),
        (
            {"effective_batch": 8.0, "effective_batch_at_most": 31.0},
            "BN103",
            ["fewer than 32 independent values", "8.0, at most 31.0, over 64", "raise batch_size", "norm=sync"],
        ),
        ({"dead": 3}, "BN109", ["3 in all", "3 of 40", "learning_rate", "activation=leaky_relu"]),
        ({"gamma_near_zero": 3}, "BN110", ["3 in all", "3 of 40", "width"]),
    ],
)  # fmt: skip
def test_a_finding_names_the_layer_the_numbers_and_the_remedy(
    changes: dict[str, Any], code: str, parts: list[str]
) -> None:
    finding = only(**changes)
    assert finding.code == code
    for part in ["1 of 2 layers", "conv2.bn", *parts]:
        assert part in finding.message
    assert str(finding).startswith(f"{code} {finding.name}: ")
    assert "docs/checks.md" in str(finding)


@pytest.mark.parametrize(
    "changes",
    [
        STALE | {"off_share": 0.5},
        STALE | {"cost": None},
        STALE | {"cost": replace(COSTLY, running_top1=0.895)},
        STALE | {"cost": replace(COSTLY, p_value=0.02)},
        STALE | {"cost": replace(COSTLY, running_top1=0.95)},
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
    assert [finding.code for finding in found] == ["BN102", "BN103", "BN109", "BN110"]
    sections = dict(re.findall(r"^## (BN\d+) (\S+)$", DOCS.read_text(), flags=re.MULTILINE))
    assert sections == {finding.code: finding.name for finding in found}


@pytest.mark.parametrize(
    ("worse", "better", "lost", "p", "matters"),
    [(8, 0, 0.08, 2 / 2**8, True), (7, 0, 0.07, 2 / 2**7, False), (20, 20, 0.0, 1, False), (0, 0, 0.0, 1, False),
     (0, 20, -0.2, 2 / 2**20, False)],
)  # fmt: skip
def test_the_cost_of_running_statistics_is_a_paired_test(
    worse: int, better: int, lost: float, p: float, matters: bool
) -> None:
    by_running, by_population = np.ones(100, bool), np.ones(100, bool)
    by_running[:worse] = False
    by_population[50 : 50 + better] = False
    cost = StatisticsCost.measure(by_running, by_population)
    assert cost.photos == 100
    assert cost.population_top1 - cost.running_top1 == pytest.approx(lost)
    assert cost.p_value == pytest.approx(p)
    assert cost.matters == matters


def test_table_and_totals() -> None:
    second = replace(SOUND, channels=120, mean_off=0.5, variance_off=3.0, off_share=1.0, effective_batch=20.0, dead=16)
    health = Health(layers=(SOUND, second))
    columns, rows = health.table()
    assert columns == [field.name for field in fields(LayerHealth)]
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
