"""Wu & Johnson 2021: how many photos are normalised together, at a batch that the optimiser keeps."""

from collections.abc import Iterator
from contextlib import contextmanager

from bnlab.lab.experiment import WITH_BN, Experiment
from bnlab.lab.lr_selection import chosen, lr_remarks
from bnlab.lab.measurements import JobContext
from bnlab.lab.plots import BARS, caption, category_series
from bnlab.lab.records import Records, Results, Row, distinct, gained, last, number, numbers, resolution, where
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.trained_network import TrainedNetwork, or_guess, train
from bnlab.lab.verdict import Evidence
from bnlab.nets.network import TableNetwork
from bnlab.norm.ghost import GhostBatchNorm
from bnlab.recipe import Recipe
from bnlab.report.plots import Plot

RUNNING, RECALIBRATED, BATCH = "running", "recalibrated", "batch"
WHOLE = "recalibrated by whole batches"
_ENOUGH = 32  # photos normalised together, which Wu & Johnson find enough


def measure(experiment: Experiment) -> Results:
    """A network for each size of the parts that are normalised together, each at each rate."""
    recipe = experiment.recipe(
        experiment.network_pair()[WITH_BN],
        width=experiment.by_budget(0.25, 1.0),
        batch_size=experiment.by_budget(32, 256),
        steps=experiment.by_budget(200, 4000),
        validate_every=1_000_000,
    )
    arms = {
        str(size): recipe.model_copy(update={"norm": "batch" if size == recipe.batch_size else f"ghost:{size}"})
        for size in sizes(experiment, recipe.batch_size)
    }
    return experiment.run_learning_rates(arms, experiment.by_budget((0.1, 0.3), (0.03, 0.1, 0.3)), by_all_statistics)


def sizes(experiment: Experiment, whole: int) -> list[int]:
    """What is normalised together: 2 photos and more, up to the whole of the optimiser's batch."""
    of_budget = experiment.by_budget((2, 4, 8, 32), (2, 4, 8, 16, 32, 64, 128))
    return [*(size for size in of_budget if size < whole), whole]


def by_all_statistics(job: JobContext, recipe: Recipe) -> Results:
    """One training; at its end the accuracy on train and test by each kind of statistics."""
    trained = train(job, recipe)
    rows = [
        _row(trained, split, statistics)
        for statistics in (RUNNING, RECALIBRATED, WHOLE, BATCH)
        for split in (("train", "test") if statistics in (RECALIBRATED, BATCH) else ("test",))
    ]
    return {"accuracy": trained.results["accuracy"], "statistics": rows}


def _row(trained: TrainedNetwork, split: str, statistics: str) -> Row:
    recipe, dataset = trained.context.recipe, trained.dataset

    def measured() -> float:
        if statistics != WHOLE:
            return trained.evaluation(split, statistics, images=recipe.recalibration_images).top1
        with whole_batches(trained.context.network, recipe.batch_size):
            return trained.evaluation(split, RECALIBRATED, images=recipe.recalibration_images).top1

    top1 = trained.majority_baseline if trained.diverged else or_guess(measured, trained.majority_baseline)
    return {"side": split, "statistics": statistics, "top1": top1, "n_test": len(dataset.in_split(split))}


@contextmanager
def whole_batches(network: TableNetwork, size: int) -> Iterator[None]:
    """Have its layers normalise batches of up to `size` photos as a whole."""
    layers = {layer: layer.ghost_size for layer in network.modules() if isinstance(layer, GhostBatchNorm)}
    try:
        for layer in layers:
            layer.ghost_size = size
        yield
    finally:
        for layer, before in layers.items():
            layer.ghost_size = before


def conclude(results: Results) -> Conclusion:
    """Two photos normalised together against 32, after recalibration of either kind."""
    rows = chosen(results, "statistics")
    test = where(rows, side="test")
    least, whole = (str(f(map(_size, test))) for f in (min, max))
    enough = str(max(size for size in map(_size, test) if size <= _ENOUGH))

    def ahead(statistics: str, first: str, second: str) -> tuple[float, ...]:
        return gained(where(test, statistics=statistics), first, second, last("top1"))

    finest = resolution(test)
    evidence = [
        Evidence(
            what=f"{how}, parts of {enough} photos give a higher test accuracy than parts of {least}",
            values=ahead(statistics, enough, least),
            above=0.0,
            unit="points",
            resolution=finest,
            primary=primary,
        )
        for statistics, how, primary in (
            (RECALIBRATED, "recalibrated as trained", True),
            (WHOLE, "recalibrated by whole batches", True),
            (RUNNING, "by running statistics", False),
            (BATCH, "by the statistics of the parts themselves", False),
        )
    ]
    inconsistent = [_gap(test, arm, RECALIBRATED, BATCH) for arm in (least, enough)]  # each: points by seed
    evidence.append(
        Evidence(
            what=f"on test the parts' own statistics lose more against recalibrated ones at {least} than at {enough}",
            values=tuple(a - b for a, b in zip(*inconsistent, strict=True)),
            above=0.0,
            unit="points",
            resolution=finest,
            primary=False,
        )
    )
    evidence.append(
        Evidence(
            what=f"recalibrated as trained, parts of {enough} are ahead of parts of {least} at the rate of the former",
            values=_at_one_rate(results, enough, least),
            above=0.0,
            unit="points",
            resolution=finest,
            primary=False,
        )
    )
    if whole != enough:
        evidence.append(
            Evidence(
                what=f"recalibrated, parts of {enough} give a higher test accuracy than the whole batch of {whole}",
                values=ahead(RECALIBRATED, enough, whole),
                above=0.0,
                unit="points",
                resolution=finest,
                primary=False,
            )
        )
    return Conclusion(
        evidence=tuple(evidence),
        plots={
            "accuracy": _by_statistics(test),
            "train and test": _by_side(rows),
            "learning rates": _by_rate(where(results["statistics"], side="test", statistics=RECALIBRATED)),
        },
        numbers={
            f"test accuracy recalibrated, parts of {arm}, %": _mean(where(test, arm=arm, statistics=RECALIBRATED))
            for arm in distinct(test, "arm")
        },
        remarks=tuple(f"parts of {remark}" for remark in lr_remarks(results)),
    )


def _size(row: Row) -> int:
    return int(str(row["arm"]))


def _gap(test: Records, arm: str, first: str, second: str) -> tuple[float, ...]:
    return gained(where(test, arm=arm), first, second, last("top1"), column="statistics")


def _at_one_rate(results: Results, first: str, second: str) -> tuple[float, ...]:
    """By how many points `first` is ahead where both have the rate that was chosen for it, seed by seed."""
    rows = where(results["statistics"], side="test", statistics=RECALIBRATED)
    ours = where(rows, arm=first, chosen=1)
    theirs = [where(rows, arm=second, seed=row["seed"], learning_rate=row["learning_rate"])[0] for row in ours]
    return tuple(100 * (number(a, "top1") - number(b, "top1")) for a, b in zip(ours, theirs, strict=True))


def _mean(rows: Records) -> float:
    return 100 * sum(number(row, "top1") for row in rows) / len(rows)


def _by_statistics(test: Records) -> Plot:
    order = distinct(test, "arm")
    names = {
        RUNNING: "running statistics",
        RECALIBRATED: "recalibrated as trained",
        WHOLE: WHOLE,
        BATCH: "the parts' own statistics",
    }
    return Plot(
        title="Test accuracy by what the network normalises by",
        x="photos normalised together in training",
        y="right on test, %",
        series=tuple(
            category_series(name, where(test, statistics=statistics), "arm", "top1", order, times=100)
            for statistics, name in names.items()
        ),
        categories=[str(arm) for arm in order],
        caption=caption(test, BARS),
        table="statistics",
    )


def _by_rate(rows: Records) -> Plot:
    order = distinct(rows, "arm")
    return Plot(
        title="Test accuracy at each learning rate that was tried",
        x="photos normalised together in training",
        y="right on test, %",
        series=tuple(
            category_series(f"learning rate {rate:g}", where(rows, learning_rate=rate), "arm", "top1", order, times=100)
            for rate in sorted(set(numbers(rows, "learning_rate")))
        ),
        categories=[str(arm) for arm in order],
        caption=caption(rows, f"recalibrated as trained; {BARS}"),
        table="statistics",
    )


def _by_side(rows: Records) -> Plot:
    test, order = where(rows, side="test"), distinct(rows, "arm")
    names = {BATCH: "the parts' own statistics", RECALIBRATED: "recalibrated as trained"}
    return Plot(
        title="Train and test, as in training and as in inference",
        x="photos normalised together in training",
        y="right, %",
        series=tuple(
            category_series(
                f"{split}, {name}", where(rows, side=split, statistics=statistics), "arm", "top1", order, 100
            )
            for split in ("train", "test")
            for statistics, name in names.items()
        ),
        categories=[str(arm) for arm in order],
        caption=caption(test, f"train without augmentation; {BARS}"),
        table="statistics",
    )


STUDY = Study(
    name="batch-size",
    title="Photos normalised together",
    claim="""Networks that were trained with very small normalisation batches are less accurate in inference, and
    recalibrated population statistics do not repair that.""",
    source="Wu & Johnson 2021 (arXiv 2105.07576); ghost batches: Hoffer, Hubara & Soudry 2017 (arXiv 1705.08741)",
    protocol="""One network, the same initial weights, and the same batches of the optimiser (32 photos quick, 256
    full); each is normalised in parts of at most so many photos, as equal as can be, up to the whole. Steps: 200 quick,
    4,000 full. The learning rate is chosen for each size and seed by val (quick: 0.1 or 0.3; full: 0.03, 0.1 or 0.3),
    so that no size is held back by a rate that suits another; how sizes compare at one rate, as the source has them,
    stands beside. Each trained network is evaluated by running statistics, by population statistics measured on train
    with its layers normalising in the parts they were trained with (256 photos quick, 1,024 full) or whole batches, and
    by the statistics of the parts themselves, which stand in shuffled order. The source trained on ImageNet; the last
    maps of a small network have fewer positions, and these count as examples too.""",
    rule=f"""Two clauses: parts of {_ENOUGH} photos (or the whole batch, where it is smaller) give a higher test
    accuracy than parts of 2 (difference above 0), recalibrated in parts as trained, and recalibrated by whole batches.
    Each by its 95% interval over seeds. All else stands beside.""",
    measure=measure,
    conclude=conclude,
    min_photos=200,
)
