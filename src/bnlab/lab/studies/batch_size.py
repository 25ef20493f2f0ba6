"""Wu & Johnson 2021: how many photos are normalised together, where the optimiser's batch stays the same."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

from bnlab.lab.clauses import points_clause
from bnlab.lab.experiment import WITH_BN, Experiment
from bnlab.lab.lr_selection import chosen, lr_remarks
from bnlab.lab.measurements import JobContext
from bnlab.lab.plots import BARS, caption, category_plot
from bnlab.lab.records import Records, Results, average, distinct, gained, last, number, numbers, where
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.trained_network import majority_baseline, or_guess, train
from bnlab.nets.network import TableNetwork
from bnlab.norm.ghost import GhostBatchNorm
from bnlab.recipe import Recipe
from bnlab.report.plots import Plot

RUNNING, RECALIBRATED, BATCH = "running", "recalibrated", "batch"
WHOLE = "recalibrated by whole batches"
_ENOUGH = 32  # photos normalised together, which Wu & Johnson find enough
_LABELS = {
    RUNNING: "running statistics",
    RECALIBRATED: "recalibrated as trained",
    WHOLE: WHOLE,
    BATCH: "the parts' own statistics",
}


def measure(experiment: Experiment) -> Results:
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


def sizes(experiment: Experiment, batch_size: int) -> list[int]:
    """The numbers of photos that are normalised together, from 2 to the optimiser's batch."""
    parts = experiment.by_budget((2, 4, 8, 32), (2, 4, 8, 16, 32, 64, 128))
    return [*(size for size in parts if size < batch_size), batch_size]


def by_all_statistics(job: JobContext, recipe: Recipe) -> Results:
    """One training, and the final accuracy on train and test by each kind of statistics."""
    trained = train(job, recipe)
    guess, network = majority_baseline(trained.context.dataset), trained.context.network

    def measured(split: str, statistics: str) -> float:
        whole = statistics == WHOLE
        with whole_batches(network, recipe.batch_size) if whole else nullcontext():
            kind = RECALIBRATED if whole else statistics
            return trained.evaluation(split, kind, images=recipe.recalibration_images).top1

    rows: Records = []
    for statistics in _LABELS:
        for split in ("train", "test") if statistics in (RECALIBRATED, BATCH) else ("test",):
            top1 = guess if trained.diverged else or_guess(partial(measured, split, statistics), guess)
            n_test = len(trained.context.dataset.in_split(split))
            rows.append({"side": split, "statistics": statistics, "top1": top1, "n_test": n_test})
    return {"accuracy": trained.results["accuracy"], "statistics": rows}


@contextmanager
def whole_batches(network: TableNetwork, size: int) -> Iterator[None]:
    """Lets the layers of a network normalise batches of up to `size` photos undivided."""
    layers = {layer: layer.ghost_size for layer in network.modules() if isinstance(layer, GhostBatchNorm)}
    try:
        for layer in layers:
            layer.ghost_size = size
        yield
    finally:
        for layer, before in layers.items():
            layer.ghost_size = before


def conclude(results: Results) -> Conclusion:
    rows = chosen(results, "statistics")
    test = where(rows, side="test")
    by_rate = where(results["statistics"], side="test", statistics=RECALIBRATED)
    arms = [int(str(arm)) for arm in distinct(test, "arm")]
    least, whole, enough = str(min(arms)), str(max(arms)), str(max(arm for arm in arms if arm <= _ENOUGH))
    clause = partial(points_clause, tested=test, above=0.0)
    secondary = partial(clause, primary=False)

    def ahead(statistics: str, second: str = least) -> list[float]:
        return gained(where(test, statistics=statistics), enough, second, last("top1"))

    # By how many points `enough` is ahead where both have the rate that was chosen for it, seed by seed.
    ours = where(by_rate, arm=enough, chosen=1)
    theirs = [where(by_rate, arm=least, seed=row["seed"], learning_rate=row["learning_rate"])[0] for row in ours]
    at_one_rate = [100 * (number(a, "top1") - number(b, "top1")) for a, b in zip(ours, theirs, strict=True)]
    lost = [gained(where(test, arm=arm), RECALIBRATED, BATCH, last("top1"), "statistics") for arm in (least, enough)]
    higher = f"parts of {enough} photos give a higher test accuracy than parts of {least}"
    evidence = [
        clause(f"recalibrated as trained, {higher}", ahead(RECALIBRATED)),
        clause(f"recalibrated by whole batches, {higher}", ahead(WHOLE)),
        secondary(f"by running statistics, {higher}", ahead(RUNNING)),
        secondary(f"by the statistics of the parts themselves, {higher}", ahead(BATCH)),
        secondary(
            f"on test the parts' own statistics lose more against recalibrated ones at {least} than at {enough}",
            [few - many for few, many in zip(*lost, strict=True)],
        ),
        secondary(
            f"recalibrated as trained, parts of {enough} are ahead of parts of {least} at the rate of the former",
            at_one_rate,
        ),
    ]
    if whole != enough:
        what = f"recalibrated, parts of {enough} give a higher test accuracy than the whole batch of {whole}"
        evidence.append(secondary(what, ahead(RECALIBRATED, whole)))
    recalibrated = where(test, statistics=RECALIBRATED)
    return Conclusion(
        evidence=tuple(evidence),
        plots=_plots(rows, by_rate),
        numbers={
            f"test accuracy recalibrated, parts of {arm}, %": 100 * average(where(recalibrated, arm=arm), "top1")
            for arm in distinct(recalibrated, "arm")
        },
        remarks=tuple(f"parts of {remark}" for remark in lr_remarks(results)),
    )


def _plots(rows: Records, by_rate: Records) -> dict[str, Plot]:
    test = where(rows, side="test")

    def plot(title: str, groups: dict[str, Records], what: str = "", y: str = "test accuracy, %") -> Plot:
        about = {"title": title, "x": "photos normalised together in training", "y": y, "table": "statistics"}
        text = caption(test, what + BARS)
        return category_plot(groups, "arm", "top1", distinct(rows, "arm"), times=100, caption=text, **about)

    by_statistics = {name: where(test, statistics=statistics) for statistics, name in _LABELS.items()}
    by_split = {
        f"{split}, {_LABELS[statistics]}": where(rows, side=split, statistics=statistics)
        for split in ("train", "test")
        for statistics in (BATCH, RECALIBRATED)
    }
    rates = sorted(set(numbers(by_rate, "learning_rate")))
    at_rates = {f"learning rate {rate:g}": where(by_rate, learning_rate=rate) for rate in rates}
    return {
        "accuracy": plot("Test accuracy by what the network normalises by", by_statistics),
        "train and test": plot(
            "Train and test, as in training and as in inference",
            by_split,
            "train without augmentation; ",
            "accuracy, %",
        ),
        "learning rates": plot(
            "Test accuracy at each learning rate that was tried", at_rates, "recalibrated as trained; "
        ),
    }


STUDY = Study(
    name="batch-size",
    title="Photos normalised together",
    claim="""Networks that were trained with very small normalisation batches are less accurate in inference, and
    recalibrated population statistics do not repair that.""",
    source="Wu & Johnson 2021 (arXiv 2105.07576); ghost batches: Hoffer, Hubara & Soudry 2017 (arXiv 1705.08741)",
    protocol="""One network is trained several times, from the same initial weights and on the same batches of the
    optimiser (32 photos; full: 256) for 200 steps (full: 4,000). Each training normalises the batch in parts of at most
    so many photos, as equal as possible; the largest part is the batch itself. The learning rate is chosen for each
    size and seed by val accuracy (0.1 or 0.3; full: 0.03, 0.1 or 0.3), so that no size has a rate that suits another.
    The comparison at one rate, which is the source's, is secondary. Each trained network is evaluated by its running
    statistics; by population statistics measured on train (256 photos; full: 1,024), where its layers normalise either
    the parts that they were trained with or whole batches; and by the statistics of the parts themselves, with the
    photos in shuffled order. The source trained on ImageNet. The last maps of a small network have fewer positions, and
    positions count as examples too.""",
    rule=f"""There are two clauses. Parts of {_ENOUGH} photos (or the batch, where it is smaller) give a higher test
    accuracy than parts of 2 (the difference is above 0), both when the network is recalibrated in parts as it was
    trained and when it is recalibrated by whole batches. Each is decided by its 95% interval over seeds. All other
    comparisons are secondary.""",
    measure=measure,
    conclude=conclude,
    min_photos=200,
)
