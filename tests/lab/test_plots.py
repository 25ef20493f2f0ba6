import pytest

from bnlab.lab.plots import caption, category_plot, interval_series, series_by_arm, series_over_seeds
from bnlab.lab.verdict import Evidence
from bnlab.report.plots import plot_svg


def row(seed: int, step: int | None, top1: float | None, arm: str = "a") -> dict[str, object]:
    return {"arm": arm, "seed": seed, "step": step, "top1": top1, "n_test": 100}


def test_a_line_is_the_mean_over_seeds_and_a_band_their_range() -> None:
    rows = [row(0, 1, 0.2), row(0, 2, 0.4), row(1, 1, 0.4), row(1, 2, 0.8), row(1, 3, None), row(0, 1, 0.5, "b")]
    a, b = series_by_arm(rows, "step", "top1", times=100)
    assert (a.name, a.x) == ("a", (1.0, 2.0))
    assert a.y == pytest.approx((30, 60))
    assert a.low == pytest.approx((20, 40))
    assert a.high == pytest.approx((40, 80))
    assert (b.name, b.x, b.y) == ("b", (1.0,), (50.0,))


def test_seeds_validated_at_different_steps_are_compared_at_the_same() -> None:
    """Otherwise each point would be of one seed, and the line would jump between the seeds."""
    rows = [row(0, 30, 0.3), row(0, 60, 0.6), row(1, 32, 0.3), row(1, 64, 0.6)]
    line = series_over_seeds("a", rows, "step", "top1")
    assert line.x == (32.0, 60.0)
    assert line.y == pytest.approx(((0.32 + 0.3) / 2, (0.6 + 0.3 + 0.3 * 28 / 32) / 2))
    assert all(low < high for low, high in zip(line.low, line.high, strict=True))


def test_categories_keep_their_positions() -> None:
    rows = [row(0, 1, 0.2, "b"), row(1, 1, 0.4, "b")]
    plot = category_plot({"p": rows}, "arm", "top1", ["a", "b"], times=100, title="", x="", caption="", table="t")
    points = plot.series[0]
    assert (points.x, points.low, points.high) == ((1.0,), (20.0,), (40.0,))
    assert points.y == pytest.approx((30,))
    assert caption(rows, "x") == "2 seeds, about 100 test photos each; x"


def test_intervals_are_drawn_where_they_are_bounded() -> None:
    many, one, none = (Evidence(what="x", values=values) for values in ((1.0, 2.0, 3.0), (4.0,), (1.0, float("nan"))))
    series = interval_series("gain", [many, none, one])
    assert (series.x, series.y) == ((0.0, 2.0), (2.0, 4.0))
    assert (series.low[0], series.high[0]) == many.interval
    assert (series.low[1], series.high[1]) == (4.0, 4.0)


def test_rounding_moves_no_mean_outside_the_range_of_its_values() -> None:
    """The sum of three times 0.1 over three is more than 0.1, and a bar of negative length cannot be drawn."""
    rows = [{"arm": "a", "y": 0.1, "seed": seed} for seed in range(3)]
    assert sum([0.1] * 3) / 3 > 0.1
    plot = category_plot({"a": rows}, "arm", "y", ["a"], title="", x="", caption="", table="t")
    series = plot.series[0]
    assert series.low == series.y == series.high == (0.1,)
    assert "<svg" in plot_svg(plot)
