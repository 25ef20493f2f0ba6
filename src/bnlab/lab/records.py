"""The tables of a study, with a row for each thing that was measured, and what is read from them."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial

Value = float | int | str | None
Row = dict[str, Value]
Records = list[Row]
Results = dict[str, Records]
"""Tables by name, which is also the name of the CSV file."""
Pick = Callable[[Records], float]
"""Reads a number from the rows of an arm and a seed."""


def where(records: Iterable[Row], **equal: Value) -> Records:
    """The rows whose columns have these values."""
    return [row for row in records if all(row[key] == value for key, value in equal.items())]


def distinct(records: Iterable[Row], column: str) -> list[Value]:
    """The values of a column, in the order of their first rows."""
    return list(dict.fromkeys(row[column] for row in records))


def number(row: Row, column: str) -> float:
    value = row[column]
    assert isinstance(value, int | float), f"{column} is {value!r}"
    return float(value)


def numbers(records: Iterable[Row], column: str) -> list[float]:
    return [number(row, column) for row in records]


def seeds(records: Iterable[Row]) -> list[int]:
    return sorted({int(number(row, "seed")) for row in records})


def by_seed(records: Records, pick: Pick, **equal: Value) -> list[float]:
    """One number for each seed: what `pick` returns for those of its rows whose columns have these values.

    NaN if a seed has no such rows, so that two lists of numbers can be compared seed by seed.
    """
    rows = [where(records, seed=seed, **equal) for seed in seeds(records)]
    return [pick(of_seed) if of_seed else math.nan for of_seed in rows]


def average(records: Records, column: str) -> float:
    """The mean of a column, or NaN if there are no rows."""
    values = numbers(records, column)
    return sum(values) / len(values) if values else math.nan


def last_rows(records: Iterable[Row], *columns: str) -> Records:
    """The last row of each combination of values that these columns have, such as the end of each training."""
    return list({tuple(row[column] for column in columns): row for row in records}.values())


def last(column: str) -> Pick:
    """Picks a column of the last row."""
    return lambda rows: number(rows[-1], column)


def differences(
    records: Records, first: Value, second: Value, pick: Pick, column: str = "arm", *, times: float = 1.0
) -> list[float]:
    """By how much the number of one arm is above that of another, times a factor, seed by seed."""
    ours, theirs = (by_seed(records, pick, **{column: arm}) for arm in (first, second))
    return [times * (a - b) for a, b in zip(ours, theirs, strict=True)]


gained = partial(differences, times=100.0)
"""By how many percentage points the fraction of one arm is above that of another, seed by seed."""


def ratios(records: Records, first: Value, second: Value, pick: Pick) -> list[float]:
    """How many times as large the number of one arm is as that of another, seed by seed."""
    ours, theirs = (by_seed(records, pick, arm=arm) for arm in (first, second))
    return [a / b if b else math.inf for a, b in zip(ours, theirs, strict=True)]


def mean(column: str) -> Pick:
    return lambda rows: average(rows, column)


def geometric_mean(column: str, over: str | None = None) -> Pick:
    """Picks the geometric mean of a column, or of its ratio to the column `over`; 0 counts as 1e-300."""

    def pick(rows: Records) -> float:
        values = [number(row, column) / (number(row, over) if over else 1.0) for row in rows]
        return math.exp(sum(math.log(max(value, 1e-300)) for value in values) / len(values))

    return pick


def joined(parts: Iterable[tuple[Mapping[str, Value], Results]]) -> Results:
    """Tables of the same name are joined into one, each row with the labels of its part in front."""
    tables: Results = {}
    for labels, results in parts:
        for name, rows in results.items():
            tables.setdefault(name, []).extend({**labels, **row} for row in rows)
    return tables


def learnt_threshold(row: Row) -> float:
    """The accuracy above which a network has learnt: 10 points above the majority baseline, or twice it if less."""
    baseline = number(row, "guess")
    return baseline + min(0.1, baseline)
