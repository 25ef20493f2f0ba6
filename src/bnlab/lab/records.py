"""What a study measures: tables of named columns, a row for each thing measured. They become its CSV files."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

Value = float | int | str | None
Row = dict[str, Value]
Records = list[Row]
Results = dict[str, Records]
"""by name; the name is that of the CSV file too"""


def where(records: Iterable[Row], **equal: Value) -> Records:
    """The rows whose columns have these values."""
    return [row for row in records if all(row[key] == value for key, value in equal.items())]


def distinct(records: Iterable[Row], column: str) -> list[Value]:
    """The values of a column, in the order of their first rows."""
    return list(dict.fromkeys(row[column] for row in records))


def number(row: Row, column: str) -> float:
    """A value that has to be a number."""
    value = row[column]
    assert isinstance(value, int | float), f"{column} is {value!r}"
    return float(value)


def numbers(records: Iterable[Row], column: str) -> list[float]:
    """A column's values, which have to be numbers."""
    return [number(row, column) for row in records]


def seeds(records: Iterable[Row]) -> list[int]:
    """The seeds there are rows of, rising."""
    return sorted({int(number(row, "seed")) for row in records})


def by_seed(records: Sequence[Row], pick: Callable[[Records], float], **equal: Value) -> list[float]:
    """One number for each seed there are rows of: what `pick` makes of its rows among those with these values.

    NaN where a seed has none of these, so that what is compared seed by seed stays of one seed.
    """
    chosen = where(records, **equal)
    rows = {seed: where(chosen, seed=seed) for seed in seeds(records)}
    return [pick(of_seed) if of_seed else math.nan for of_seed in rows.values()]


def average(records: Sequence[Row], column: str) -> float:
    """The mean of a column's values; NaN of no rows."""
    values = numbers(records, column)
    return sum(values) / len(values) if values else math.nan


def last(column: str) -> Callable[[Records], float]:
    """Picks the last row's value."""
    return lambda rows: number(rows[-1], column)


def resolution(records: Sequence[Row]) -> float:
    """The least step of an accuracy in percentage points: one test photo."""
    return 100 / min(numbers(records, "n_test"))


def gained(
    records: Sequence[Row], first: Value, second: Value, pick: Callable[[Records], float], column: str = "arm"
) -> tuple[float, ...]:
    """By how many percentage points one arm's share is above another's, seed by seed."""
    ours, theirs = (by_seed(records, pick, **{column: arm}) for arm in (first, second))
    return tuple(100 * (a - b) for a, b in zip(ours, theirs, strict=True))


def ratios(
    records: Sequence[Row], first: Value, second: Value, pick: Callable[[Records], float], column: str = "arm"
) -> tuple[float, ...]:
    """How many times as large one arm's number is as another's, seed by seed."""
    ours, theirs = (by_seed(records, pick, **{column: arm}) for arm in (first, second))
    return tuple(a / b if b else math.inf for a, b in zip(ours, theirs, strict=True))


def mean(column: str) -> Callable[[Records], float]:
    """Picks the mean of the rows' values."""
    return lambda rows: average(rows, column)


def labelled(results: Results, labels: Mapping[str, Value]) -> Results:
    """The same tables, with columns in front that say whose they are."""
    return {name: [{**labels, **row} for row in rows] for name, rows in results.items()}


def joined(parts: Iterable[Results]) -> Results:
    """All rows of the tables of a name, one below the other."""
    whole: Results = {}
    for results in parts:
        for name, rows in results.items():
            whole.setdefault(name, []).extend(rows)
    return whole


def learnt_threshold(row: Row) -> float:
    """The accuracy that a network has to pass to count as having learnt anything: guessing, and 10 points.

    Or twice guessing, where there are so many classes that this is less.
    """
    guess = number(row, "guess")
    return guess + min(0.1, guess)
