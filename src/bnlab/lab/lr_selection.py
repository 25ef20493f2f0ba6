"""Chooses the learning rate of each arm of a study by val, so that no arm is held back by the rate of another."""

from bnlab.errors import plural
from bnlab.lab.records import Records, Results, Row, Value, distinct, last_rows, number, numbers, seeds, where


def mark_chosen(results: Results) -> Results:
    """Add a column `chosen`: 1 if the row's learning rate is the best of its arm and seed by the last val accuracy."""
    best: dict[tuple[Value, Value], Value] = {}
    ends = last_rows(results["accuracy"], "arm", "seed", "learning_rate")
    for row in sorted(ends, key=lambda row: number(row, "val_top1"), reverse=True):
        best.setdefault((row["arm"], row["seed"]), row["learning_rate"])  # the first of equals

    def marked(row: Row) -> Row:
        is_best = row["learning_rate"] == best[row["arm"], row["seed"]]
        return {"arm": row["arm"], "learning_rate": row["learning_rate"], "chosen": int(is_best), **row}

    return {name: [marked(row) for row in rows] for name, rows in results.items()}


def chosen(results: Results, name: str = "accuracy") -> Records:
    """The rows of a table that have the chosen learning rates."""
    return where(results[name], chosen=1)


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
