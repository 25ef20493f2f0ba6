"""Series for the plots of a study, from the rows of its tables. `bnlab.report.plots` draws them."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np

from bnlab.errors import plural
from bnlab.lab.records import Records, Value, average, distinct, number, numbers, seeds, where
from bnlab.lab.verdict import Evidence
from bnlab.report.plots import Plot, Series

BAND = "line: mean over seeds, band: lowest to highest"
BARS = "point: mean over seeds, bar: lowest to highest"


def caption(records: Records, text: str, about: str = "") -> str:
    """A caption: the number of seeds, what else is known (default: the test photos), and what the marks are."""
    about = about or f"about {average(records, 'n_test'):.0f} test photos each"
    return f"{plural(len(seeds(records)), 'seed')}, {about}; {text}"


def series_by_arm(records: Records, x: str, y: str, *, arm: str = "arm", times: float = 1.0) -> tuple[Series, ...]:
    """A series for each value of the column `arm`: see `series_over_seeds`."""
    return tuple(
        series_over_seeds(str(name), where(records, **{arm: name}), x, y, times=times)
        for name in distinct(records, arm)
    )


def series_over_seeds(name: str, records: Records, x: str, y: str, *, times: float = 1.0) -> Series:
    """The mean over seeds of column `y`, times a factor, by column `x`, with the range of the seeds.

    If the seeds have different values of `x`, since their epochs have different lengths, each seed is interpolated
    linearly, and the series has all values of `x` that lie within the range of every seed.
    """
    rows = [row for row in records if row[x] is not None and row[y] is not None]
    curves = []
    for seed in seeds(rows):
        of_seed = where(rows, seed=seed)
        own = sorted(set(numbers(of_seed, x)))
        curves.append((own, [average(where(of_seed, **{x: at}), y) for at in own]))
    xs = sorted({at for own, _ in curves for at in own})
    if any(own != xs for own, _ in curves):
        first, last = max(own[0] for own, _ in curves), min(own[-1] for own, _ in curves)
        xs = [at for at in xs if first <= at <= last]
    values = [[times * value for value in np.interp(xs, own, ys)] for own, ys in curves]
    return _ranges(name, xs, list(zip(*values, strict=True)))


def _ranges(name: str, xs: Sequence[float], values: Sequence[Sequence[float]], **about: Any) -> Series:
    """The mean and the range of some values at each x. `about` are fields of `Series`."""
    means = [sum(at) / len(at) for at in values]
    low, high = list(map(min, values)), list(map(max, values))
    # Rounding must not move a mean outside the range of its values, since no bar has a negative length.
    y = [min(max(mean, least), most) for mean, least, most in zip(means, low, high, strict=True)]
    return Series(name=name, x=tuple(xs), y=tuple(y), low=tuple(low), high=tuple(high), **about)


def interval_series(name: str, evidence: Sequence[Evidence]) -> Series:
    """Means with their intervals at 0, 1, ... Means that are NaN and unbounded intervals are left out."""
    points = [
        (float(i), each.mean, *(each.interval if all(map(isfinite, each.interval)) else (each.mean, each.mean)))
        for i, each in enumerate(evidence)
        if isfinite(each.mean)
    ]
    x, y, low, high = zip(*points, strict=True) if points else ((), (), (), ())
    return Series(name=name, x=x, y=y, low=low, high=high, kind="points")


def accuracy_curves(
    records: Records, title: str, *, x: str = "step", label: str = "steps", arm: str = "arm", log_x: bool = False
) -> Plot:
    """The test accuracy by the column `x`, which the plot calls `label`: one line for each value of `arm`."""
    return Plot(
        title=title,
        x=label,
        y="test accuracy, %",
        series=series_by_arm(records, x, "test_top1", arm=arm, times=100),
        caption=caption(records, BAND),
        table="accuracy",
        log_x=log_x,
    )


def category_plot(
    groups: Mapping[str, Records], column: str, value: str, order: Sequence[Value], *, times: float = 1.0, **about: Any
) -> Plot:
    """Points: the mean of `value`, times a factor, for each value of `column` in this order, with the range.

    There is one series for each group. `about` are fields of `Plot`; the vertical axis is the test accuracy in percent
    unless it says otherwise.
    """
    series = []
    for name, rows in groups.items():
        found = [[times * number(row, value) for row in where(rows, **{column: category})] for category in order]
        there = {float(i): values for i, values in enumerate(found) if values}
        series.append(_ranges(name, list(there), list(there.values()), kind="points"))
    return Plot(series=tuple(series), categories=tuple(map(str, order)), **{"y": "test accuracy, %"} | about)
