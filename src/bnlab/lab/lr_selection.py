"""Chooses the learning rate of each arm of a study by val, so that no arm is held back by the rate of another."""

import math
from collections.abc import Mapping, Sequence

from bnlab.errors import plural
from bnlab.lab.records import Records, Results, Row, Value, distinct, learnt_threshold, number, numbers, seeds, where


def mark_chosen(results: Results) -> Results:
    """Add a column `chosen`: 1 if the row's learning rate is the best of its arm and seed by the last val accuracy."""
    best: dict[tuple[Value, int], Value] = {}
    accuracies = results["accuracy"]
    for arm in distinct(accuracies, "arm"):
        for seed in seeds(accuracies):
            rows = where(accuracies, arm=arm, seed=seed)
            last = {row["learning_rate"]: number(row, "val_top1") for row in rows}
            best[arm, seed] = max(last, key=lambda rate: last[rate])
    return {name: [_with_choice(row, best) for row in rows] for name, rows in results.items()}


def chosen(results: Results, name: str = "accuracy") -> Records:
    """The rows of a table that have the chosen learning rates."""
    return where(results[name], chosen=1)


def _with_choice(row: Row, best: Mapping[tuple[Value, int], Value]) -> Row:
    is_best = row["learning_rate"] == best[row["arm"], int(number(row, "seed"))]
    return {"arm": row["arm"], "learning_rate": row["learning_rate"], "chosen": int(is_best), **row}


def lr_remarks(results: Results) -> tuple[str, ...]:
    """A sentence for each arm whose best rate was the lowest or highest tried, and those on diverged trainings."""
    accuracies = results["accuracy"]
    rates = sorted(set(numbers(accuracies, "learning_rate")))
    sentences = []
    for arm in distinct(accuracies, "arm"):
        rows = where(accuracies, arm=arm)
        best = [number(where(rows, seed=seed, chosen=1)[-1], "learning_rate") for seed in seeds(rows)]
        for rate, end in ((rates[0], "lowest"), (rates[-1], "highest")):
            if count := best.count(rate):
                sentences.append(
                    f"{arm}: the best learning rate was the {end} tried ({rate:g}) for {plural(count, 'seed')} of "
                    f"{len(best)}; a better one may lie outside"
                )
        sentences += divergence_remarks(rows)
    return tuple(sentences)


def divergence_remarks(records: Records, counted: str = "counts as guessing") -> tuple[str, ...]:
    """A sentence for each arm with trainings that diverged. `counted` says how such a training counts."""
    sentences = []
    for arm in distinct(records, "arm"):
        rows = [row for row in where(records, arm=arm) if row["diverged_at"] is not None]
        trainings = {(row["seed"], row.get("learning_rate")) for row in rows}
        if trainings:
            rates = sorted({number(row, "learning_rate") for row in rows if "learning_rate" in row})
            at = f", at learning rates of {', '.join(f'{rate:g}' for rate in rates)}" if rates else ""
            sentences.append(f"{arm}: {plural(len(trainings), 'training')} diverged{at}; one that does {counted}")
    return tuple(sentences)


class LearntFilter:
    """Which arms learnt in which seeds: a comparison with an arm that only guesses shows nothing.

    Args:
        accuracies: the rows of one training for each arm and seed.
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
        """The values, one for each seed, with NaN for the seeds in which one of these arms did not learn."""
        learnt = [not any((arm, seed) in self.guessing for arm in arms) for seed in self.seeds]
        return tuple(value if all_learnt else math.nan for value, all_learnt in zip(values, learnt, strict=True))

    @property
    def remarks(self) -> tuple[str, ...]:
        """A sentence for each arm that did not learn in some seed."""
        arms = sorted({str(arm) for arm, _ in self.guessing})
        return tuple(
            f"{arm}: did no better than guess in {sum(one == arm for one, _ in self.guessing)} of {len(self.seeds)} "
            "seeds; what is compared with it is not shown"
            for arm in arms
        )
