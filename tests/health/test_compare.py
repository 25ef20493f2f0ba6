"""Paired comparisons: McNemar's test, Newcombe's interval and the t-test against published and simulated values."""

import math

import numpy as np
import pytest

from bnlab.health.compare import Comparison


def scores(both: int, gained: int, lost: int, neither: int) -> tuple[list[int], list[int]]:
    before = [1] * both + [0] * gained + [1] * lost + [0] * neither
    after = [1] * both + [1] * gained + [0] * lost + [0] * neither
    return before, after


def test_the_interval_of_independent_results_is_newcombes_for_two_samples() -> None:
    """Where phi is 0, method 10 is the square-and-add interval: 0.2 of 100 and 0.5 of 100, from 100 pairs."""
    found = Comparison.measure(*scores(both=10, gained=40, lost=10, neither=40))
    low1, high1, low2, high2 = 0.133367, 0.288829, 0.403832, 0.596168  # Wilson's intervals of 0.2 and 0.5
    low = 0.3 - ((0.5 - low2) ** 2 + (high1 - 0.2) ** 2) ** 0.5
    high = 0.3 + ((high2 - 0.5) ** 2 + (0.2 - low1) ** 2) ** 0.5
    assert found.interval == pytest.approx((low, high), abs=1e-5)


def test_mcnemar_is_exact() -> None:
    found = Comparison.measure(*scores(both=50, gained=8, lost=1, neither=41))
    assert found.p_value == pytest.approx(2 * (1 + 9) / 2**9)
    assert found.gain == pytest.approx(0.07)
    assert found.n == 100


def test_the_same_results_have_no_difference() -> None:
    found = Comparison.measure([1, 0, 1], [1, 0, 1])
    assert (found.gain, found.p_value, found.matters) == (0.0, 1.0, False)
    assert found.interval[0] <= 0 <= found.interval[1]


@pytest.mark.parametrize(
    ("gained", "lost", "matters"),
    [(30, 5, True), (5, 30, False), (9, 0, False), (12, 0, True), (40, 30, False)],
)
def test_a_gain_matters_if_it_is_large_and_significant(gained: int, lost: int, matters: bool) -> None:
    """Of 1,000 images: 9 are less than a point, and 40 against 30 are chance."""
    found = Comparison.measure(*scores(both=800, gained=gained, lost=lost, neither=200 - gained - lost))
    assert found.matters == matters


def test_the_interval_covers_the_truth() -> None:
    """In 95% of simulated data sets, as binomial intervals do: from 93% to 97%."""
    random = np.random.default_rng(0)
    probabilities, truth, n = [0.6, 0.15, 0.05, 0.2], 0.1, 120
    covered = 0
    for _ in range(1000):
        counts = random.multinomial(n, probabilities)
        low, high = Comparison.measure(*scores(*counts)).interval
        covered += low <= truth <= high
    assert 930 <= covered <= 975


def test_another_metric_is_compared_by_the_t_test() -> None:
    before, after = [0.1, 0.4, 0.35, 0.8], [0.3, 0.5, 0.55, 0.9]
    found = Comparison.measure(before, after, "metric")
    differences = np.subtract(after, before)
    t = differences.mean() / (differences.std(ddof=1) / 2)
    assert not found.is_accuracy
    assert found.gain == pytest.approx(0.15)
    half = 3.182446 * differences.std(ddof=1) / 2
    assert found.interval == pytest.approx((0.15 - half, 0.15 + half), abs=1e-6)
    assert t == pytest.approx(5.196152)
    assert found.p_value == pytest.approx(0.013846, abs=1e-5)
    assert not found.matters


def test_a_metric_of_zeros_and_ones_is_no_accuracy() -> None:
    found = Comparison.measure([0, 0, 0, 1], [1, 1, 0, 1], "metric of batches")
    assert str(found) == "0.25 instead of 0.75 on 4 batches (0.5, 95% interval -0.419 to 1.42, p = 0.2)"


def test_the_share_of_correct_positions_is_an_accuracy() -> None:
    found = Comparison.measure([0.5, 0.625], [0.75, 0.75])
    assert found.is_accuracy
    assert str(found).startswith("56.2% instead of 75.0% on 2 images (18.8 points, ")


def test_scores_that_are_not_finite_show_nothing() -> None:
    found = Comparison.measure([0.5, 0.2], [math.nan, 0.3])
    assert found.p_value == 1.0
    assert not found.matters


def test_the_text_has_points_interval_and_p() -> None:
    text = str(Comparison.measure(*scores(both=600, gained=200, lost=10, neither=190)))
    assert text.startswith("61.0% instead of 80.0% on 1,000 images (19.0 points, 95% interval 16.")
    assert "p = " in text


@pytest.mark.parametrize(("before", "after"), [([], []), ([1], [1, 0]), ([[1]], [[0]])])
def test_scores_must_pair_up(before: list[int], after: list[int]) -> None:
    with pytest.raises(ValueError, match="scores of the same images"):
        Comparison.measure(before, after)


def test_reversed_swaps_before_and_after() -> None:
    found = Comparison.measure(*scores(both=600, gained=200, lost=10, neither=190))
    other = found.reversed()
    assert (other.before, other.after, other.gain) == (found.after, found.before, -found.gain)
    assert other.interval == (-found.interval[1], -found.interval[0])
