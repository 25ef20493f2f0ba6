"""Tests of many channels at once, and how much the initial statistics still weigh."""

from dataclasses import replace

import numpy as np
import pytest

from bnlab.health.evidence import LayerEvidence, Sample
from bnlab.health.statistics import benjamini_hochberg, effective_batch, significant, weight_of_initial


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


def batches_of(means: np.ndarray, size: int, channels: int) -> Sample:
    """What is measured of batches with these means, K x C, of values with the variance 1."""
    groups = np.stack([means, np.ones_like(means)], 1)
    return Sample(
        count=len(means) * size,
        batches=len(means),
        mean=means.mean(0),
        variance=np.ones(channels),
        between=means.var(0, ddof=1),
        groups=groups,
    )


@pytest.mark.parametrize(("independent", "least", "most"), [(1, 1.5, 2.4), (32, 1.1, 1.25)])
def test_the_interval_counts_correlated_channels_once(independent: int, least: float, most: float) -> None:
    """The upper end covers the true 16 in 97.5% of 400 samples, whether 32 channels are independent or all the same."""
    random = np.random.default_rng(0)
    covered, factors = 0, []
    for _ in range(400):
        means = np.tile(random.normal(0, 1 / 4, (12, independent)), (1, 32 // independent))
        size, at_most = effective_batch(batches_of(means, 16, 32), 0.0) or (0, 0)
        covered += at_most >= 16
        factors.append(at_most / size)
    assert 0.955 <= covered / 400 <= 0.995
    assert least < np.median(factors) < most


def test_the_effective_batch_leaves_out_channels_that_eps_normalises() -> None:
    sample = batches_of(np.random.default_rng(0).normal(size=(12, 2)), 16, 2)
    alone = effective_batch(batches_of(sample.groups[:, 0, :1], 16, 1), 1e-5)  # type: ignore[index]
    with_constant = replace(sample, variance=np.array([1.0, 1e-7]))
    assert effective_batch(with_constant, 1e-5) == pytest.approx(alone)
    assert effective_batch(replace(sample, variance=np.full(2, 1e-7)), 1e-5) is None
    assert effective_batch(replace(sample, batches=1), 1e-5) is None
