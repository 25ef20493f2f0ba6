import math

import pytest

from bnlab.lab.records import Records, Results, where
from bnlab.lab.studies.learning_rate.study import BASELINE, PROBED, STUDY, SUCCESSORS
from bnlab.lab.verdict import Verdict
from tests.lab.studies.helpers import MakeExperiment, draw


def curve(arm: str, seed: int, reached: float, best: float, steps: int = 1000) -> Records:
    """From guessing, 0.1, straight up to the baseline's best, 0.5, at step `reached`, and on to `best` at the end."""
    points = [(0.95 * reached, 0.48), (reached, 0.5)] if best >= 0.5 else []
    points += [(steps, best)] if reached < steps or best < 0.5 else []
    return [
        {
            "arm": arm, "learning_rate": 0.1, "seed": seed, "chosen": 1, "family": arm, "step": step,
            "test_top1": top1, "val_top1": top1, "n_test": 500, "guess": 0.1, "diverged_at": None,
        }
        for step, top1 in points
    ]  # fmt: skip


def planted(faster: float, better: float, highest: float) -> Results:
    """BN-x5 `faster` times as fast, BN-x30 `better` in the end, BN bearing `highest` times the rate; noise by seed."""
    results: Results = {"accuracy": [], "highest": [], "tried": []}
    for seed, noise in enumerate((0.98, 1.0, 1.02)):
        results["accuracy"] += curve(BASELINE, seed, 1000, 0.5)
        for arm in SUCCESSORS:
            best = 0.5 + (better * noise if arm == "BN-x30" else 0.1)
            results["accuracy"] += curve(arm, seed, 1000 / (faster * noise), best)
        for arm in PROBED:
            rate = 0.1 * (1 if arm == BASELINE else highest * noise)
            results["highest"].append({"arm": arm, "seed": seed, "rate": rate, "at_least": 0})
    return results


@pytest.mark.parametrize(
    ("results", "verdict"),
    [
        (planted(20, 0.1, 8), Verdict.HOLDS),
        (planted(5, 0.1, 8), Verdict.DOES_NOT_HOLD),  # faster, but not 14 times
        (planted(20, -0.1, 8), Verdict.DOES_NOT_HOLD),
        (planted(20, 0.1, 0.5), Verdict.DOES_NOT_HOLD),
        (planted(14, 0.1, 8), Verdict.NOT_SHOWN),
    ],
)
def test_the_verdict_follows_from_the_numbers(results: Results, verdict: Verdict) -> None:
    assert STUDY.conclude(results).verdict == verdict


def test_an_arm_that_never_gets_there_counts_as_if_with_the_last_step() -> None:
    results = planted(20, 0.1, 8)
    for row in where(results["accuracy"], arm="BN-x5", seed=1):
        row["test_top1"] = 0.3
    conclusion = STUDY.conclude(results)
    assert conclusion.evidence[0].values[1] == 1.0
    assert any(
        "BN-x5 did not reach the best accuracy of Inception in 1 of 3" in remark for remark in conclusion.remarks
    )


def test_14_times_is_not_shown_by_validations_too_far_apart() -> None:
    results = planted(20, 0.1, 8)
    for row in results["accuracy"]:  # as if validated only at the end
        row["step"] = 1000 if row["arm"] == BASELINE else row["step"]
        row["test_top1"] = 0.9 if row["arm"] == "BN-x5" else row["test_top1"]
    for seed in range(3):  # Inception's 1000 steps / 14 = 71 lie within BN-x5's first interval
        where(results["accuracy"], arm="BN-x5", seed=seed)[0]["step"] = 100
    conclusion = STUDY.conclude(results)
    assert [each.verdict for each in conclusion.evidence[:2]] == [Verdict.HOLDS, Verdict.NOT_SHOWN]
    assert conclusion.verdict == Verdict.NOT_SHOWN
    assert any("14 times fewer steps is not known in 3 of 3 seeds" in remark for remark in conclusion.remarks)


def test_without_a_stable_rate_there_is_no_ratio() -> None:
    results = planted(20, 0.1, 8)
    results["highest"][0]["rate"] = None
    for row in where(results["highest"], arm="BN-x5"):
        row["at_least"] = 1
    conclusion = STUDY.conclude(results)
    assert math.isnan(conclusion.evidence[3].values[0])
    assert conclusion.verdict == Verdict.NOT_SHOWN
    assert "highest stable rate of Inception: no rate was stable in 1 of 3 seeds" in conclusion.remarks
    assert "highest stable rate of BN-x5: the highest tried was stable in 3 of 3 seeds" in conclusion.remarks
    draw(conclusion)


def test_rates_are_known_to_a_factor_of_two_each() -> None:
    level, twice, four = (STUDY.conclude(planted(20, 0.1, times)).evidence[3] for times in (1, 2, 4))
    assert [level.verdict, twice.verdict, four.verdict] == [Verdict.NOT_SHOWN, Verdict.NOT_SHOWN, Verdict.HOLDS]


def test_nothing_is_better_than_an_inception_that_guesses() -> None:
    results = planted(20, 0.1, 8)
    for row in where(results["accuracy"], arm=BASELINE):
        row["test_top1"] = row["val_top1"] = 0.12
    evidence = STUDY.conclude(results).evidence
    assert all(math.isnan(value) for i in (0, 1, 2, 6) for value in evidence[i].values)


def test_a_remark_says_for_every_arm_which_trainings_diverged() -> None:
    results = planted(20, 0.1, 8)
    where(results["accuracy"], arm="BN-x30", seed=1)[-1]["diverged_at"] = 7
    assert any(remark.startswith("BN-x30: 1 training diverged") for remark in STUDY.conclude(results).remarks)


def test_the_search_is_drawn_by_multiples_of_what_suits_inception() -> None:
    results = planted(20, 0.1, 8)
    for row in where(results["accuracy"], seed=2):
        row["learning_rate"] = 7.0
    assert {x for series in STUDY.conclude(results).plots["search"].series for x in series.x} == {1.0}


@pytest.mark.slow
def test_it_is_measured(make_experiment: MakeExperiment) -> None:
    results = STUDY.measure(make_experiment())
    arms = {row["arm"] for row in where(results["accuracy"], chosen=1)}
    assert arms == {BASELINE, *SUCCESSORS}
    for seed in (0, 1):
        rate = where(results["accuracy"], arm=BASELINE, seed=seed, chosen=1)[0]["learning_rate"]
        for arm, (_, factor) in SUCCESSORS.items():
            assert where(results["accuracy"], arm=arm, seed=seed)[0]["learning_rate"] == pytest.approx(factor * rate)
    draw(STUDY.conclude(results))
