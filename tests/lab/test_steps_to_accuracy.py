import math

import pytest

from bnlab.lab.records import Records
from bnlab.lab.steps_to_accuracy import StepsToAccuracy, best_test_top1, steps_to


def trained(arm: str, *points: tuple[int, float], seed: int = 0, val: dict[int, float] | None = None) -> Records:
    return [
        {"arm": arm, "seed": seed, "step": step, "test_top1": top1, "guess": 0.2, "n_test": 400,
         "val_top1": (val or {}).get(step, top1)}
        for step, top1 in points
    ]  # fmt: skip


def test_the_best_is_chosen_by_val_and_told_of_test() -> None:
    assert best_test_top1(trained("a", (10, 0.5), (20, 0.9), (30, 0.6), val={10: 0.1, 20: 0.2, 30: 0.3})) == 0.6
    assert best_test_top1(trained("a", (10, 0.5), (20, 0.9), val={10: 0.3, 20: 0.3})) == 0.5


def test_steps_are_read_off_straight_lines() -> None:
    rows = trained("a", (10, 0.4), (20, 0.8), (30, 0.6))
    for target, at, after, by in ((0.3, 5, 0, 10), (0.4, 10, 0, 10), (0.7, 17.5, 10, 20)):
        there = steps_to(rows, target)
        assert there is not None
        assert there.at == pytest.approx(at)
        assert (there.after, there.by) == (after, by)
    assert steps_to(rows, 0.81) is None


def test_arms_race_to_the_best_of_the_baseline() -> None:
    race = StepsToAccuracy(trained("slow", (100, 0.4), (200, 0.6)) + trained("fast", (20, 0.6), (200, 0.9)), "slow")
    assert race.speedup("fast") == (pytest.approx(10),)
    assert race.speedup("slow") == (1,)
    assert race.mean_steps("fast") == pytest.approx(20)
    assert race.remarks == []


def test_who_never_gets_there_counts_as_with_its_last_step() -> None:
    race = StepsToAccuracy(trained("slow", (100, 0.4), (200, 0.6)) + trained("lame", (100, 0.5), (200, 0.5)), "slow")
    assert race.speedup("lame") == (1,)
    assert race.remarks == [
        "lame did not reach the best accuracy of slow in 1 of 1 trainings; these count as if it had with their last "
        "step, which favours it"
    ]


def test_where_the_baseline_guesses_there_is_no_race() -> None:
    race = StepsToAccuracy(trained("slow", (100, 0.2), (200, 0.23)) + trained("fast", (20, 0.6), (200, 0.9)), "slow")
    assert math.isnan(race.speedup("fast")[0])
    assert math.isnan(race.mean_steps("fast"))
    assert race.remarks == ["slow did no better than guess in 1 of 1 trainings, which give no speed"]


@pytest.mark.parametrize(("factor", "told"), [(3, True), (5, False), (8, False), (9, False), (11, True)])
def test_what_the_judgements_cannot_tell_is_not_told(factor: float, told: bool) -> None:
    slow = trained("slow", (100, 0.3), (200, 0.6))  # between 100 and 200
    race = StepsToAccuracy(
        slow + trained("fast", (20, 0.4), (25, 0.7)), "slow"
    )  # between 20 and 25: from 4 to 10 times
    assert math.isnan(race.speedup_if_resolved(factor, "fast")[0]) != told


def test_within_the_first_judgement_there_is_no_most() -> None:
    race = StepsToAccuracy(trained("slow", (100, 0.3), (200, 0.6)) + trained("fast", (20, 0.6)), "slow")
    assert math.isnan(race.speedup_if_resolved(1000, "fast")[0])
    assert race.speedup_if_resolved(4, "fast") == (pytest.approx(10),)
