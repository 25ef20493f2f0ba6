"""The learning rate of each arm of a study: each gets the one that suits it, chosen by val, so none is held back."""

import math
from collections.abc import Mapping, Sequence

from bnlab.errors import plural
from bnlab.lab.records import Records, Results, Row, Value, distinct, learnt_threshold, number, numbers, seeds, where


def mark_chosen(results: Results) -> Results:
    """The tables with a column `chosen`: 1 where the learning rate is its arm's and seed's best by val, else 0."""
    best: dict[tuple[Value, int], Value] = {}
    accuracies = results["accuracy"]
    for arm in distinct(accuracies, "arm"):
        for seed in seeds(accuracies):
            rows = where(accuracies, arm=arm, seed=seed)
            last = {row["learning_rate"]: number(row, "val_top1") for row in rows}
            best[arm, seed] = max(last, key=lambda rate: last[rate])
    return {name: [_with_choice(row, best) for row in rows] for name, rows in results.items()}


def chosen(results: Results, name: str = "accuracy") -> Records:
    """The rows of a table that are of the chosen learning rates."""
    return where(results[name], chosen=1)


def _with_choice(row: Row, best: Mapping[tuple[Value, int], Value]) -> Row:
    mine = row["learning_rate"] == best[row["arm"], int(number(row, "seed"))]
    return {"arm": row["arm"], "learning_rate": row["learning_rate"], "chosen": int(mine), **row}


def lr_remarks(results: Results) -> tuple[str, ...]:
    """What has to be known of the choice: rates at an end of what was tried, and trainings that diverged."""
    accuracies = results["accuracy"]
    rates = sorted(set(numbers(accuracies, "learning_rate")))
    sentences = []
    for arm in distinct(accuracies, "arm"):
        rows = where(accuracies, arm=arm)
        best = [number(where(rows, seed=seed, chosen=1)[-1], "learning_rate") for seed in seeds(rows)]
        for rate, end in ((rates[0], "lowest"), (rates[-1], "highest")):
            if number_of := best.count(rate):
                sentences.append(
                    f"{arm}: the best learning rate was the {end} tried ({rate:g}) for {plural(number_of, 'seed')} of "
                    f"{len(best)}; a better one may lie outside"
                )
        sentences += divergence_remarks(rows)
    return tuple(sentences)


def divergence_remarks(records: Records, counted: str = "counts as guessing") -> tuple[str, ...]:
    """A sentence for each arm of which trainings diverged, and how these count."""
    sentences = []
    for arm in distinct(records, "arm"):
        rows = [row for row in where(records, arm=arm) if row["diverged_at"] is not None]
        gone = {(row["seed"], row.get("learning_rate")) for row in rows}
        if gone:
            rates = sorted({number(row, "learning_rate") for row in rows if "learning_rate" in row})
            at = f", at learning rates of {', '.join(f'{rate:g}' for rate in rates)}" if rates else ""
            sentences.append(f"{arm}: {plural(len(gone), 'training')} diverged{at}; one that does {counted}")
    return tuple(sentences)


class LearntFilter:
    """Which arms learnt in which seeds: of two of which one only guesses, a comparison says nothing.

    Args:
        accuracies: one training for each arm and seed.
    """

    def __init__(self, accuracies: Records) -> None:
        self.seeds = seeds(accuracies)
        self.guessing = {
            (arm, seed)
            for arm in distinct(accuracies, "arm")
            for seed in self.seeds
            if (rows := where(accuracies, arm=arm, seed=seed))
            and number(rows[-1], "test_top1") <= learnt_threshold(rows[-1])
        }

    def only(self, values: Sequence[float], *arms: str) -> tuple[float, ...]:
        """The values, one for each seed; NaN where one of these arms does no better than guess."""
        known = [not any((arm, seed) in self.guessing for arm in arms) for seed in self.seeds]
        return tuple(value if told else math.nan for value, told in zip(values, known, strict=True))

    @property
    def remarks(self) -> tuple[str, ...]:
        """A sentence for each arm that only guesses somewhere."""
        arms = sorted({str(arm) for arm, _ in self.guessing})
        return tuple(
            f"{arm}: did no better than guess in {sum(one == arm for one, _ in self.guessing)} of {len(self.seeds)} "
            "seeds; what is compared with it is not shown"
            for arm in arms
        )
