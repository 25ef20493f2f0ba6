import pytest

from bnlab.lab.measurements import JobContext
from bnlab.lab.records import number, where
from bnlab.lab.studies.learning_rate.max_stable_lr import bisected, max_stable_lr
from tests.lab.studies.helpers import MakeExperiment


@pytest.mark.parametrize(("limit", "found"), [(1.0, 1.0), (3.9, 2.0), (0.3, 0.25), (0.6, 0.5), (70.0, 64.0)])
def test_the_highest_rate_is_found_to_a_factor_of_two(limit: float, found: float) -> None:
    tried: list[float] = []
    rate, ended = bisected(lambda rate: (tried.append(rate), rate <= limit)[1], 1.0)
    assert rate == pytest.approx(found)
    assert ended
    assert found <= limit < 2 * found
    assert len(tried) <= 7


def test_a_search_gives_up_and_says_so() -> None:
    assert bisected(lambda rate: True, 1.0) == (4.0**6, False)
    assert bisected(lambda rate: False, 1.0) == (None, True)


def test_a_rate_that_was_not_stable_is_never_given() -> None:
    for lowest in range(-9, 9):
        rate, _ = bisected(lambda rate, limit=3.0 * 4.0**lowest: rate <= limit, 1.0)
        assert rate is None or rate <= 3.0 * 4.0**lowest


def test_it_is_measured(make_experiment: MakeExperiment, job: JobContext) -> None:
    recipe = (
        make_experiment(steps=6, size=16)
        .recipe("bn_mlp", schedule="constant")
        .model_copy(update={"learning_rate": 0.1})
    )
    results = max_stable_lr(job, recipe)
    rate = number(results["highest"][0], "rate")
    assert number(where(results["tried"], rate=rate)[0], "stable") == 1
    assert all(number(row, "rate") > rate for row in where(results["tried"], stable=0))
    assert all(number(row, "rate") <= rate for row in where(results["tried"], stable=1))


def test_a_network_that_has_blown_up_is_not_stable(make_experiment: MakeExperiment, job: JobContext) -> None:
    recipe = (
        make_experiment(steps=6, size=16)
        .recipe("mlp", activation="relu", schedule="constant")
        .model_copy(update={"learning_rate": 1e6})
    )
    results = max_stable_lr(job, recipe)
    assert results["tried"][0]["stable"] == 0
    assert where(results["tried"], rate=1e6)[0]["loss"] is None


def test_nor_is_one_whose_statistics_have(make_experiment: MakeExperiment, job: JobContext) -> None:
    recipe = make_experiment(steps=3, size=16).recipe("bn_mlp", schedule="constant")
    found = max_stable_lr(job, recipe.model_copy(update={"learning_rate": 1e30}))
    assert found["tried"][0]["stable"] == 0
