import math

import pytest

from bnlab.lab.records import (
    by_seed,
    distinct,
    gained,
    geometric_mean,
    joined,
    last,
    last_rows,
    learnt_threshold,
    mean,
    ratios,
    where,
)

ROWS = [
    {"arm": arm, "seed": seed, "step": step, "top1": top1, "n_test": 50 + seed}
    for arm, seed, step, top1 in (
        ("a", 1, 1, 0.5), ("a", 1, 2, 0.75), ("a", 0, 1, 0.25), ("a", 0, 2, 0.5), ("b", 0, 2, 0.25), ("b", 1, 2, 0.0),
    )
]  # fmt: skip


def test_rows_are_chosen_and_compared_seed_by_seed() -> None:
    assert [row["step"] for row in where(ROWS, arm="a", seed=1)] == [1, 2]
    assert distinct(ROWS, "arm") == ["a", "b"]
    assert by_seed(ROWS, last("top1"), arm="a") == [0.5, 0.75]  # seeds rise, whatever the order of the rows
    assert by_seed(ROWS, mean("top1"), arm="a") == [0.375, 0.625]
    assert gained(ROWS, "a", "b", last("top1")) == [25.0, 75.0]
    assert ratios(ROWS, "a", "b", last("top1")) == [2.0, math.inf]


def test_tables_are_labelled_and_joined() -> None:
    tables = joined([({"arm": "a"}, {"t": [{"x": 1}]}), ({}, {"t": [{"x": 2}], "u": []})])
    assert tables == {"t": [{"arm": "a", "x": 1}, {"x": 2}], "u": []}
    assert list(tables["t"][0]) == ["arm", "x"]


def test_the_learnt_threshold_is_ten_points_above_the_baseline_or_twice_the_baseline() -> None:
    assert learnt_threshold({"guess": 0.2}) == pytest.approx(0.3)
    assert learnt_threshold({"guess": 0.01}) == pytest.approx(0.02)


def test_last_rows_are_those_of_each_combination() -> None:
    assert [(row["arm"], row["seed"], row["top1"]) for row in last_rows(ROWS, "arm", "seed")] == [
        ("a", 1, 0.75),
        ("a", 0, 0.5),
        ("b", 0, 0.25),
        ("b", 1, 0.0),
    ]


def test_geometric_means_are_of_a_column_or_of_its_ratio_to_another() -> None:
    rows = [{"x": 1.0, "y": 2.0}, {"x": 4.0, "y": 0.5}]
    assert geometric_mean("x")(rows) == pytest.approx(2)
    assert geometric_mean("x", "y")(rows) == pytest.approx(2)
    assert geometric_mean("x")([{"x": 0.0}]) == pytest.approx(1e-300)
