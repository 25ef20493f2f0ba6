"""What a study draws, said in numbers; `bnlab.report.plots` puts it on paper.

Every number of a plot comes from the study's tables, which lie beside it as CSV.
"""

from collections import defaultdict
from collections.abc import Sequence
from math import isfinite

import numpy as np

from bnlab.errors import plural
from bnlab.lab.records import Records, Value, distinct, number, seeds, where
from bnlab.lab.verdict import Evidence
from bnlab.report.plots import Series

BAND = "line: mean over seeds, band: lowest to highest"
BARS = "point: mean over seeds, bar: lowest to highest"


def caption(records: Records, text: str) -> str:
    """What a plot has to say of itself: n, seeds, and what its marks are."""
    n = round(sum(number(row, "n_test") for row in records) / len(records))
    return f"{plural(len(seeds(records)), 'seed')}, about {n} test photos each; {text}"


def series_by_arm(records: Records, x: str, y: str, *, arm: str = "arm", times: float = 1.0) -> tuple[Series, ...]:
    """One series for each value of the column `arm`: the mean over seeds of `y` by `x`, and the range of the seeds."""
    return tuple(
        series_over_seeds(str(name), where(records, **{arm: name}), x, y, times=times)
        for name in distinct(records, arm)
    )


def series_over_seeds(name: str, records: Records, x: str, y: str, *, times: float = 1.0) -> Series:
    """The mean over seeds of `y` by `x`, of the rows that have both, with the range of the seeds.

    Seeds that were looked at in other places than one another (their epochs are not of equally many steps) are each
    taken to run straight between their own; the series has all places that lie within every seed's.
    """
    rows = [row for row in records if row[x] is not None and row[y] is not None]
    courses = [_course(where(rows, seed=seed), x, y) for seed in seeds(rows)]
    places = sorted({place for course in courses for place in course})
    if any(set(course) != set(places) for course in courses):
        first, last = max(min(course) for course in courses), min(max(course) for course in courses)
        places = [place for place in places if first <= place <= last]
    values = [[times * v for v in np.interp(places, sorted(c), [c[p] for p in sorted(c)])] for c in courses]
    at = list(zip(*values, strict=True))
    return Series(
        name=name,
        x=tuple(places),
        y=tuple(sum(of_seeds) / len(of_seeds) for of_seeds in at),
        low=tuple(map(min, at)),
        high=tuple(map(max, at)),
    )


def interval_series(name: str, evidence: Sequence[Evidence]) -> Series:
    """Means with their intervals, at 0, 1, ...; a mean of one seed, which has none, stands alone. NaN is left out."""
    there = [(i, each) for i, each in enumerate(evidence) if isfinite(each.mean)]
    ends = [each.interval if all(map(isfinite, each.interval)) else (each.mean, each.mean) for _, each in there]
    return Series(
        name=name,
        x=tuple(float(i) for i, _ in there),
        y=tuple(each.mean for _, each in there),
        low=tuple(low for low, _ in ends),
        high=tuple(high for _, high in ends),
        kind="points",
    )


def _course(rows: Records, x: str, y: str) -> dict[float, float]:
    """From place to the mean of what there is."""
    found: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        found[number(row, x)].append(number(row, y))
    return {place: sum(values) / len(values) for place, values in found.items()}


def category_series(
    name: str, records: Records, column: str, y: str, order: Sequence[Value], times: float = 1.0
) -> Series:
    """The mean of `y` at 0, 1, ... for each value of a column in this order, with the range over its rows."""
    found = [[times * number(row, y) for row in where(records, **{column: value})] for value in order]
    there = [(i, values) for i, values in enumerate(found) if values]
    return Series(
        name=name,
        x=tuple(float(i) for i, _ in there),
        y=tuple(sum(values) / len(values) for _, values in there),
        low=tuple(min(values) for _, values in there),
        high=tuple(max(values) for _, values in there),
        kind="points",
    )
