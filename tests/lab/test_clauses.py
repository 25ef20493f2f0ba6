import math

import pytest

from bnlab.lab.clauses import LearntFilter, points_clause, ratio_clause, without_seeds
from bnlab.lab.records import Records
from bnlab.lab.verdict import Verdict

TESTED: Records = [{"n_test": 200}, {"n_test": 500}]


def test_points_are_resolved_to_one_photo_of_the_smallest_test_split() -> None:
    clause = points_clause("it is higher", [0.4, 0.4, 0.4], TESTED, above=0.0)
    assert clause.interval == pytest.approx((-0.1, 0.9))
    assert clause.verdict is Verdict.NOT_SHOWN
    assert clause.unit == "points"


@pytest.mark.parametrize(("below", "verdict"), [(1.0, Verdict.HOLDS), (0.2, Verdict.DOES_NOT_HOLD)])
def test_ratios_are_averaged_as_logarithms(below: float, verdict: Verdict) -> None:
    clause = ratio_clause("it is smaller", (0.2, 0.5, 0.8), below=below)
    assert clause.mean == pytest.approx((0.2 * 0.5 * 0.8) ** (1 / 3))
    assert ratio_clause("it is smaller", (0.24, 0.25, 0.26), below=below).verdict is verdict


def test_lost_seeds_have_no_number_and_others_keep_theirs() -> None:
    rows: Records = [{"seed": seed, "top1": 0.5, "other": 1} for seed in range(3)]
    known = [not math.isnan(float(row["top1"] or 0)) for row in without_seeds(rows, [1], "top1")]
    assert known == [True, False, True]
    assert all(row["top1"] == 0.5 and row["other"] == 1 for row in rows)


def ended(arm: str, seed: int, test: float = 0.9) -> Records:
    return [{"arm": arm, "seed": seed, "step": step, "test_top1": test, "guess": 0.1} for step in (10, 20)]


@pytest.mark.parametrize(("test", "guesses"), [(0.19, True), (0.21, False)])
def test_a_comparison_with_an_arm_that_guesses_is_nan(test: float, guesses: bool) -> None:
    learnt = LearntFilter([*ended("a", 0, test), *ended("a", 1), *ended("b", 0)])
    first, second = learnt.only((1.0, 2.0), "a", "b")
    assert math.isnan(first) == guesses
    assert second == 2.0
    assert learnt.only((1.0, 2.0), "b") == [1.0, 2.0]
    remark = "a: did no better than guess in 1 of 2 seeds; what is compared with it is not shown"
    assert learnt.remarks == ((remark,) if guesses else ())
