import math

import pytest

from bnlab.lab.records import Records
from bnlab.lab.studies.learning_rate.steps_to_accuracy import Reached, StepsToAccuracy, best_test_top1, steps_to


def trained(arm: str, *points: tuple[int, float], seed: int = 0, val: dict[int, float] | None = None) -> Records:
    return [
        {"arm": arm, "seed": seed, "step": step, "test_top1": top1, "guess": 0.2, "n_test": 400,
         "val_top1": (val or {}).get(step, top1)}
        for step, top1 in points
    ]  # fmt: skip


def test_the_best_is_chosen_by_val_and_reported_on_test() -> None:
    assert best_test_top1(trained("a", (10, 0.5), (20, 0.9), (30, 0.6), val={10: 0.1, 20: 0.2, 30: 0.3})) == 0.6
    assert best_test_top1(trained("a", (10, 0.5), (20, 0.9), val={10: 0.3, 20: 0.3})) == 0.5


def test_steps_are_read_off_straight_lines() -> None:
    rows = trained("a", (10, 0.4), (20, 0.8), (30, 0.6))
    for target, at, after, by in ((0.3, 5, 0, 10), (0.4, 10, 0, 10), (0.7, 17.5, 10, 20)):
        reached = steps_to(rows, target)
        assert reached.at == pytest.approx(at)
        assert (reached.after, reached.by) == (after, by)
    assert steps_to(rows, 0.81) == Reached(30, 30, math.inf)


def test_arms_are_compared_by_their_steps_to_the_best_of_the_baseline() -> None:
    steps = StepsToAccuracy(trained("slow", (100, 0.4), (200, 0.6)) + trained("fast", (20, 0.6), (200, 0.9)), "slow")
    assert steps.speedup("fast") == [pytest.approx(10)]
    assert steps.speedup("slow") == [1]
    assert steps.mean_steps("fast") == pytest.approx(20)
    assert steps.remarks == []


def test_an_arm_that_never_reaches_it_counts_with_its_last_step() -> None:
    steps = StepsToAccuracy(trained("slow", (100, 0.4), (200, 0.6)) + trained("lame", (100, 0.5), (200, 0.5)), "slow")
    assert steps.speedup("lame") == [1]
    assert steps.remarks == [
        "lame did not reach the best accuracy of slow in 1 of 1 trainings; these count as if it had with their last "
        "step, which favours it"
    ]


def test_a_baseline_that_guesses_gives_no_numbers() -> None:
    steps = StepsToAccuracy(trained("slow", (100, 0.2), (200, 0.23)) + trained("fast", (20, 0.6), (200, 0.9)), "slow")
    assert math.isnan(steps.speedup("fast")[0])
    assert math.isnan(steps.mean_steps("fast"))
    assert steps.remarks == ["slow did no better than guess in 1 of 1 trainings, which give no speed"]


@pytest.mark.parametrize(("factor", "resolved"), [(3, True), (5, False), (8, False), (9, False), (11, True)])
def test_a_factor_that_the_validations_do_not_resolve_gives_nan(factor: float, resolved: bool) -> None:
    slow = trained("slow", (100, 0.3), (200, 0.6))  # between 100 and 200
    steps = StepsToAccuracy(
        slow + trained("fast", (20, 0.4), (25, 0.7)), "slow"
    )  # between 20 and 25: from 4 to 10 times
    assert math.isnan(steps.speedup("fast", factor)[0]) != resolved


def test_before_the_first_validation_the_speedup_has_no_upper_bound() -> None:
    steps = StepsToAccuracy(trained("slow", (100, 0.3), (200, 0.6)) + trained("fast", (20, 0.6)), "slow")
    assert math.isnan(steps.speedup("fast", 1000)[0])
    assert steps.speedup("fast", 4) == [pytest.approx(10)]
