from collections.abc import Callable

import pytest

from bnlab.lab.bench import Bench
from bnlab.lab.records import Records, Tables, where
from bnlab.lab.stable_rate import bisected
from bnlab.lab.studies.learning_rate import BASELINE, PROBED, STUDY, SUCCESSORS, steps_to
from bnlab.lab.verdict import Verdict
from bnlab.report.plots import plot_svg

MakeBench = Callable[..., Bench]


def curve(arm: str, seed: int, reached: float, best: float, steps: int = 1000) -> Records:
    """From guessing, 0.1, straight up to the baseline's best, 0.5, at step `reached`, and on to `best` at the end."""
    points = [(reached, 0.5), (steps, best)] if reached < steps and best >= 0.5 else [(steps, best)]
    return [
        {
            "arm": arm, "learning_rate": 0.1, "seed": seed, "chosen": 1, "family": arm, "step": step,
            "test_top1": top1, "val_top1": top1, "n_test": 500, "guess": 0.1, "diverged_at": None,
        }
        for step, top1 in points
    ]  # fmt: skip


def planted(faster: float, better: float, highest: float) -> Tables:
    """BN-x5 `faster` times as fast, BN-x30 `better` in the end, BN bearing `highest` times the rate; noise by seed."""
    tables: Tables = {"accuracy": [], "highest": [], "tried": []}
    for seed, noise in enumerate((0.98, 1.0, 1.02)):
        tables["accuracy"] += curve(BASELINE, seed, 1000, 0.5)
        for arm in SUCCESSORS:
            best = 0.5 + (better * noise if arm == "BN-x30" else 0.1)
            tables["accuracy"] += curve(arm, seed, 1000 / (faster * noise), best)
        for arm in PROBED:
            rate = 0.1 * (1 if arm == BASELINE else highest * noise)
            tables["highest"].append({"arm": arm, "seed": seed, "rate": rate})
    return tables


@pytest.mark.parametrize(
    ("tables", "verdict"),
    [
        (planted(20, 0.1, 8), Verdict.HOLDS),
        (planted(5, 0.1, 8), Verdict.DOES_NOT_HOLD),  # faster, but not 14 times
        (planted(20, -0.1, 8), Verdict.DOES_NOT_HOLD),
        (planted(20, 0.1, 0.5), Verdict.DOES_NOT_HOLD),
        (planted(14, 0.1, 8), Verdict.NOT_SHOWN),
    ],
)
def test_the_verdict_follows_from_the_numbers(tables: Tables, verdict: Verdict) -> None:
    assert STUDY.judge(tables).verdict == verdict


def test_who_never_gets_there_counts_as_if_with_the_last_step() -> None:
    tables = planted(20, 0.1, 8)
    for row in where(tables["accuracy"], arm="BN-x5", seed=1):
        row["test_top1"] = 0.3
    findings = STUDY.judge(tables)
    assert findings.evidence[0].values[1] == 1.0
    assert any("BN-x5 did not reach the best accuracy of Inception in 1 of 3" in remark for remark in findings.remarks)


def test_steps_are_read_off_straight_lines() -> None:
    rows = [{"step": step, "test_top1": top1, "guess": 0.2} for step, top1 in ((10, 0.4), (20, 0.8), (30, 0.6))]
    assert steps_to(rows, 0.3) == pytest.approx(5)
    assert steps_to(rows, 0.4) == pytest.approx(10)
    assert steps_to(rows, 0.7) == pytest.approx(17.5)
    assert steps_to(rows, 0.81) is None
    assert steps_to([{"step": 10, "test_top1": 0.1, "guess": 0.2}], 0.1) == 10


@pytest.mark.parametrize(("limit", "found"), [(1.0, 1.0), (3.9, 2.0), (0.3, 0.25), (0.6, 0.5), (70.0, 64.0)])
def test_the_highest_rate_is_found_to_a_factor_of_two(limit: float, found: float) -> None:
    tried: list[float] = []
    assert bisected(lambda rate: tried.append(rate) or rate <= limit, 1.0) == pytest.approx(found)
    assert found <= limit < 2 * found
    assert len(tried) <= 7


def test_a_search_ends() -> None:
    assert bisected(lambda rate: True, 1.0) > 1000
    assert bisected(lambda rate: False, 1.0) < 0.001


@pytest.mark.slow
def test_it_is_measured(make_bench: MakeBench) -> None:
    tables = STUDY.measure(make_bench())
    arms = {row["arm"] for row in where(tables["accuracy"], chosen=1)}
    assert arms == {BASELINE, *SUCCESSORS}
    for seed in (0, 1):
        rate = where(tables["accuracy"], arm=BASELINE, seed=seed, chosen=1)[0]["learning_rate"]
        for arm, (_, factor) in SUCCESSORS.items():
            assert where(tables["accuracy"], arm=arm, seed=seed)[0]["learning_rate"] == pytest.approx(factor * rate)
    for plot in STUDY.judge(tables).plots.values():
        assert "<svg" in plot_svg(plot)
