"""The range test on losses whose answer is known, without a network."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from bnlab.progress import NullProgress
from bnlab.training.lr_finder import Curve, find_lr, suggest


def swept(step: Callable[[float], float], **options: float) -> Curve:
    return find_lr(step, progress=NullProgress(), **options)  # type: ignore[arg-type]


def quadratic(curvature: float, seed: int = 0) -> Callable[[float], float]:
    """SGD on 1 + curvature x^2 / 2 with a little noise in the gradient: above a rate of 2 / curvature it diverges."""
    random = np.random.default_rng(seed)
    x = 2 / math.sqrt(curvature)

    def step(rate: float) -> float:
        nonlocal x
        loss = 1 + curvature * x * x / 2
        x -= rate * curvature * (x + 0.02 * random.normal() / math.sqrt(curvature))
        return loss

    return step


def of_smoothed(loss_at: Callable[[float], float], noise: float = 0.0, seed: int = 0) -> Curve:
    """A sweep whose loss is a function of the rate's logarithm to base 10."""
    random = np.random.default_rng(seed)
    return swept(lambda rate: loss_at(math.log10(rate)) + noise * random.normal())


def valley(exponent: float) -> float:
    """Flat, falls from 1e-4 to 1e-2 by 1, and rises from there as it fell."""
    return 2 - min(max((exponent + 4) / 2, 0), 1) + max(exponent + 2, 0) / 2


@pytest.mark.parametrize("curvature", [0.5, 4.0, 50.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_quadratic_diverges_above_two_over_its_curvature(curvature: float, seed: int) -> None:
    limit = 2 / curvature
    curve = swept(quadratic(curvature, seed), high=100.0)
    found = suggest(curve)
    assert curve.diverged_at is not None
    assert found.suggested is not None
    assert limit < curve.diverged_at < 3 * limit
    assert limit / 50 < found.suggested < limit


def test_the_rates_rise_from_end_to_end_in_equal_ratios() -> None:
    asked: list[float] = []
    curve = swept(lambda rate: asked.append(rate) or 1.0, low=1e-3, high=1.0, steps=31)  # type: ignore[func-returns-value]
    assert tuple(asked) == curve.rates
    assert curve.rates[0] == pytest.approx(1e-3)
    assert curve.rates[-1] == pytest.approx(1.0)
    assert np.diff(np.log10(curve.rates)) == pytest.approx(np.full(30, 0.1))
    assert curve.smoothed == pytest.approx((1.0,) * 31)
    assert curve.diverged_at is None


def test_smoothing_has_no_lag() -> None:
    """Of a straight line it leaves a straight line, half a power of ten from the ends; an average of the past lags."""
    curve = of_smoothed(lambda exponent: 3 - 0.3 * exponent)
    inside = slice(17, -17)
    assert curve.smoothed[inside] == pytest.approx(curve.losses[inside])


def test_a_valley_is_found_and_suggested() -> None:
    found = suggest(of_smoothed(valley))
    assert found.lowest == pytest.approx(1e-2, rel=0.08)  # a step is 7%
    assert found.suggested == pytest.approx(found.lowest, rel=0.05)
    assert found.tenth_of_minimum == pytest.approx(found.lowest / 10)
    assert found.steepest is not None
    assert 1e-4 < found.steepest < 1e-2
    assert found.suggested == float(f"{found.suggested:.2g}")


@pytest.mark.parametrize("seed", range(10))
def test_noise_moves_a_valley_little(seed: int) -> None:
    found = suggest(of_smoothed(valley, noise=0.1, seed=seed))
    assert found.suggested is not None
    assert 3e-3 < found.suggested < 3e-2


def test_noise_alone_has_no_valley() -> None:
    """A thousand flat curves: by four standard errors almost none falls."""
    found = [suggest(of_smoothed(lambda _: 2.0, noise=0.3, seed=seed)) for seed in range(1000)]
    assert sum(one.suggested is not None for one in found) <= 5
    assert "the loss never fell by more than its noise" in found[0].reason


@pytest.mark.parametrize(
    "loss_at", [lambda _: 1.6, lambda exponent: 2 + 0.1 * exponent, lambda exponent: 1 + 10 ** (exponent - 1)]
)
def test_a_loss_that_never_falls_suggests_nothing(loss_at: Callable[[float], float]) -> None:
    found = suggest(of_smoothed(loss_at))
    assert (found.suggested, found.steepest, found.tenth_of_minimum) == (None, None, None)
    assert found.reason.startswith("the loss never fell by more than its noise")


def test_a_loss_that_falls_to_the_end_suggests_nothing() -> None:
    found = suggest(of_smoothed(lambda exponent: 3 - 0.3 * exponent))
    assert found.suggested is None
    assert found.lowest == pytest.approx(10)
    assert found.reason == "the loss still fell near the highest rate tried, 10"


def test_a_loss_that_turns_at_once_suggests_nothing() -> None:
    found = suggest(of_smoothed(lambda exponent: 2 + 2 * abs(exponent + 4.6)))
    assert found.suggested is None
    assert found.reason == "the loss was lowest near the lowest rate tried, 1e-05"


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_at_once(number: float) -> None:
    curve = swept(lambda _: number)
    assert curve == Curve((), (), (), pytest.approx(1e-5))
    assert suggest(curve).suggested is None
    assert suggest(curve).reason == "the loss diverged within 8 steps, at a rate of 1e-05"


def test_a_later_loss_that_is_not_finite_ends_the_sweep_and_spoils_nothing() -> None:
    curve = swept(lambda rate: valley(math.log10(rate)) if rate < 0.1 else math.nan)
    assert curve.diverged_at == pytest.approx(0.1, rel=0.08)
    assert curve.rates[-1] < 0.1
    assert np.isfinite(curve.losses).all()
    assert np.isfinite(curve.smoothed).all()
    assert suggest(curve).suggested == suggest(of_smoothed(valley)).suggested


def test_an_explosion_ends_the_sweep_and_does_not_reach_back() -> None:
    steps = 0

    def step(rate: float) -> float:
        nonlocal steps
        steps += 1
        return valley(math.log10(rate)) if rate < 0.1 else 1e9

    curve = swept(step)
    assert steps == len(curve.rates)
    assert curve.diverged_at == curve.rates[-1] == pytest.approx(0.1, rel=0.08)
    assert max(curve.smoothed) < 5
    assert suggest(curve).suggested == suggest(of_smoothed(valley)).suggested


def test_four_times_the_lowest_is_too_high() -> None:
    """At 3.9 times it goes on; at 4.5 times it stops, some steps later, for one loss alone may be bad luck."""
    assert swept(lambda rate: 1.0 if rate < 0.01 else 3.9).diverged_at is None
    stopped = swept(lambda rate: 1.0 if rate < 0.01 else 4.5).diverged_at
    assert stopped is not None
    assert 0.015 < stopped < 0.04
