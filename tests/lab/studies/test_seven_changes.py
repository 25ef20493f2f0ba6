import pytest

from bnlab.lab.records import Results
from bnlab.lab.studies.seven_changes import CHANGES, NONE, SEVEN, STUDY
from bnlab.lab.verdict import Verdict
from tests.lab.studies.helpers import MakeExperiment, draw


def planted(together: float, alone: float = 0.0) -> Results:
    """All changes gain `together`, and each alone `alone`."""
    rows = []
    for seed, noise in enumerate((0.9, 1.0, 1.1)):
        gains = {NONE: 0.0, SEVEN: together * noise}
        for change in CHANGES.values():
            gains |= {f"only {change}": alone * noise, f"all but {change}": (together - alone) * noise}
        for arm, gain in gains.items():
            row = {"arm": arm, "seed": seed, "step": 100, "test_top1": 0.5 + gain, "n_test": 500, "diverged_at": None}
            rows.append(row)
    return {"accuracy": rows}


@pytest.mark.parametrize(
    ("together", "verdict"), [(0.1, Verdict.HOLDS), (-0.1, Verdict.DOES_NOT_HOLD), (0.001, Verdict.NOT_SHOWN)]
)
def test_all_changes_together_decide(together: float, verdict: Verdict) -> None:
    conclusion = STUDY.conclude(planted(together))
    assert conclusion.verdict == verdict
    assert [each.primary for each in conclusion.evidence] == [True] + [False] * 14


def test_each_change_has_an_interval_that_allows_for_their_number() -> None:
    conclusion = STUDY.conclude(planted(0.1, 0.05))
    alone = conclusion.evidence[1:]
    assert {each.level for each in alone} == {1 - 0.05 / 14}
    assert [each.mean for each in alone] == pytest.approx([5.0] * 14)
    draw(conclusion)


def test_a_remark_names_a_diverged_training() -> None:
    results = planted(0.1)
    results["accuracy"][0]["diverged_at"] = 7
    assert STUDY.conclude(results).remarks == ("none of them: 1 training diverged; one that does counts as guessing",)


@pytest.mark.slow
def test_each_arm_is_one_change_away(make_experiment: MakeExperiment) -> None:
    results = STUDY.measure(make_experiment())
    arms = {str(row["arm"]) for row in results["accuracy"]}
    changes = set(CHANGES.values()) - {CHANGES["local_response"]}  # which the small network does not have
    assert arms == {NONE, SEVEN} | {f"{kind} {change}" for kind in ("only", "all but") for change in changes}
    STUDY.conclude(results)
