"""What the clauses of most studies have in common: differences of accuracies, ratios, and seeds without a number.

A comparison with an arm that only guesses shows nothing, so a seed in which an arm did not learn gives no number.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from bnlab.lab.records import Records, last_rows, learnt_threshold, number, numbers, seeds
from bnlab.lab.verdict import Evidence

# A clause on how many times as large one number is as another, one ratio for each seed.
ratio_clause = partial(Evidence, unit="times", ratio=True)


def points_clause(what: str, values: Sequence[float], tested: Records, **clause: Any) -> Evidence:
    """A clause on a difference of accuracies in percentage points, one value for each seed.

    Its interval is no narrower than one photo of the smallest test split in `tested`. `clause` are fields of Evidence.
    """
    return Evidence(what, values, unit="points", resolution=100 / min(numbers(tested, "n_test")), **clause)


def secondary(*evidence: Evidence) -> tuple[Evidence, ...]:
    """The same clauses, from which the verdict does not follow."""
    return tuple(replace(each, primary=False) for each in evidence)


def without_seeds(rows: Records, lost: Collection[int], column: str) -> Records:
    """The rows with NaN in `column` for the seeds in `lost`, so that their clauses have no number for these seeds."""
    return [row | {column: math.nan} if row["seed"] in lost else row for row in rows]


def seeds_that_learnt_nothing(accuracies: Records) -> list[int]:
    """The seeds of which no arm ends better than guessing."""
    ends = last_rows(accuracies, "arm", "seed")
    learnt = {row["seed"] for row in ends if number(row, "test_top1") > learnt_threshold(row)}
    return [seed for seed in seeds(accuracies) if seed not in learnt]


class LearntFilter:
    """Which arms learnt in which seeds, by the rows of one training for each arm and seed."""

    def __init__(self, accuracies: Records) -> None:
        self.seeds = seeds(accuracies)
        ends = last_rows(accuracies, "arm", "seed")
        self.guessing = [
            (str(row["arm"]), row["seed"]) for row in ends if number(row, "test_top1") <= learnt_threshold(row)
        ]

    def only(self, values: Sequence[float], *arms: str) -> list[float]:
        """The values, one for each seed, with NaN for the seeds in which one of these arms did not learn."""
        lost = [seed for arm, seed in self.guessing if arm in arms]
        return [math.nan if seed in lost else value for seed, value in zip(self.seeds, values, strict=True)]

    @property
    def remarks(self) -> tuple[str, ...]:
        """A sentence for each arm that did not learn in some seed."""
        counts = Counter(arm for arm, _ in self.guessing)
        return tuple(
            f"{arm}: did no better than guess in {count} of {len(self.seeds)} seeds; "
            "what is compared with it is not shown"
            for arm, count in sorted(counts.items())
        )
