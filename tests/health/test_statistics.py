"""Tests of many channels at once, and how much the initial statistics still weigh."""

import numpy as np
import pytest

from bnlab.health.evidence import LayerEvidence, Sample
from bnlab.health.statistics import benjamini_hochberg, significant, weight_of_initial


def test_benjamini_hochberg_is_that_of_scipy() -> None:
    from scipy.stats import false_discovery_control

    p = np.random.default_rng(0).uniform(size=200) ** 3
    assert np.array_equal(benjamini_hochberg(p, 0.05), false_discovery_control(p) <= 0.05)
    assert not benjamini_hochberg(np.array([0.5, 0.9])).any()


def test_chance_alone_is_rarely_significant() -> None:
    random = np.random.default_rng(1)
    layers = [significant(random.normal(size=64), np.ones(64)).any() for _ in range(500)]
    assert sum(layers) <= 15  # 1% of 500, with room for chance


def test_differences_that_are_not_numbers_are_not_significant() -> None:
    found = significant(np.array([np.nan, 0.0, 1.0]), np.array([1.0, 0.0, 0.0]))
    assert found.tolist() == [False, False, True]


def layer(mean: object, variance: object, running_mean: object, running_variance: object) -> LayerEvidence:
    sample = Sample(
        count=100,
        batches=4,
        mean=np.asarray(mean, float),
        variance=np.asarray(variance, float),
        between=np.zeros(2),
    )
    return LayerEvidence(
        name="bn",
        kind="BatchNorm2d",
        family="batch",
        channels=2,
        eps=0.0,
        running_mean=np.asarray(running_mean, float),
        running_variance=np.asarray(running_variance, float),
        batch=sample,
    )


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.9, 1.0])
def test_the_weight_of_the_initial_statistics_is_found(weight: float) -> None:
    mean, variance = np.array([2.0, -1.0]), np.array([4.0, 0.25])
    found = weight_of_initial(layer(mean, variance, (1 - weight) * mean, weight + (1 - weight) * variance))
    assert found == pytest.approx(weight)


def test_without_a_measurement_the_weight_is_not_known() -> None:
    assert weight_of_initial(LayerEvidence(name="bn", kind="", family="batch", channels=2, eps=0.0)) is None
    assert weight_of_initial(layer([0, 0], [1, 1], [0, 0], [1, 1])) is None
