"""Paper, Alg. 2, and Wu & Johnson 2021: population statistics against moving averages, and from how many photos."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from bnlab.data.dataset import open_recorded_data
from bnlab.lab.clauses import points_clause, seeds_that_learnt_nothing, without_seeds
from bnlab.lab.experiment import WITH_BN, Experiment
from bnlab.lab.measurements import JobContext
from bnlab.lab.plots import BAND, caption, series_by_arm, series_over_seeds
from bnlab.lab.records import Records, Results, average, by_seed, last, last_rows, number, numbers, seeds, where
from bnlab.lab.studies.inference_statistics.ema_statistics import AVERAGES, BATCH, POPULATION, USUAL, EmaStatistics
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.trained_network import train
from bnlab.recipe import Recipe
from bnlab.report.plots import Plot

_SUFFICE = 1024  # photos, which the claim says are enough
_AT_WORST, _OF_FEWER = -2.0, -1.0  # margins in points, see the rule
_KINDS = [POPULATION, BATCH, *AVERAGES.values()]


def measure(experiment: Experiment) -> Results:
    """One training for each seed. All statistics are compared on it, because they do not change how it trains."""
    # With a momentum of 1 the running statistics are those of the last batch.
    network, steps = experiment.network_pair()[WITH_BN], experiment.by_budget(250, 20_000)
    recipe = experiment.recipe(network, steps=steps, validate_every=10**6, norm_momentum=1.0)
    probes = experiment.by_budget((5, 20, 50, 100, 200), (5, 20, 100, 500, 2000, 10_000))
    return experiment.run(experiment.measurements({"one": recipe}, train_probed, probes=list(probes)))


def train_probed(job: JobContext, recipe: Recipe, probes: list[int]) -> Results:
    """One training, with evaluations after the steps in `probes` and at its end."""
    probe = EmaStatistics(open_recorded_data(job.split), probes)
    trained = train(job, recipe, probe=probe)
    end = int(number(trained.results["accuracy"][-1], "step"))
    if trained.diverged:
        probe.guess([step for step in (*probes, end) if step not in probe.probed and step <= end])
    else:
        if end not in probe.probed:
            probe.probe(end, trained.context)
        probe.count(trained.context)
    return {name: trained.results[name] for name in ("accuracy", "probes", "images")}


def conclude(results: Results) -> Conclusion:
    probes, images = results["probes"], results["images"]
    lost = seeds_that_learnt_nothing(results["accuracy"])
    learnt, points = without_seeds(probes, lost, "top1"), partial(points_clause, tested=probes)
    clauses = []
    for momentum in USUAL:
        kind, named = AVERAGES[momentum], f"the moving average of {momentum:g}"
        # The least of the gains and 0. Unlike Python's, NumPy's min is NaN if one of them is.
        at_worst = [float(np.min([0.0, *gains])) for gains in _gains(learnt, kind)]
        on_the_way, corrected = (
            [_mean_before_end(gains) for gains in _gains(learnt, against)] for against in (kind, f"{kind}, corrected")
        )
        better = f"on the way population is better than {named}"
        clauses += [
            points(f"at its worst probed step population is at least as good as {named}", at_worst, above=_AT_WORST),
            points(better, on_the_way, above=0.0),
            points(f"{better}, corrected", corrected, above=0.0, primary=False),
        ]
    tried, half = numbers(images, "images"), min(min(numbers(images, "of")) / 2, _SUFFICE)
    # As many photos as the claim says are enough, or, where those are more than half of all, the most that are not.
    few = int(max((n for n in tried if n <= half), default=min(tried)))
    fewer = [row for row in images if row["images"] != row["of"]]
    losses = by_seed(without_seeds(fewer, lost, "against_all"), last("against_all"), images=few)
    as_good = f"statistics of {few} photos are as good as those of all"
    clauses.append(points(as_good, [100 * loss for loss in losses], above=_OF_FEWER, primary=few >= _SUFFICE))
    plots = {"accuracy": _accuracy(probes), **_by_photos(fewer, caption(images, f"at the end of training; {BAND}"))}
    remarks = [f"seed {seed}: the training diverged or taught nothing, so it shows nothing" for seed in lost]
    if few < _SUFFICE:
        too_few = f"train has too few photos to test {_SUFFICE}: {few} were tested, as a secondary clause"
        remarks = [too_few, *remarks]
    return Conclusion(
        evidence=tuple(clauses),
        plots={name: plot for name, plot in plots.items() if any(series.x for series in plot.series)},
        numbers={
            f"test accuracy at the end, {kind}, %": 100
            * average(last_rows(where(probes, statistics=kind), "seed"), "top1")
            for kind in _KINDS
        },
        remarks=tuple(remarks),
    )


def _gains(probes: Records, statistics: str) -> list[list[float]]:
    """By how many points population statistics are ahead at each probed step, seed by seed."""
    ours, theirs = (where(probes, statistics=kind) for kind in (POPULATION, statistics))
    then = {(row["seed"], row["step"]): number(row, "top1") for row in theirs}
    ahead = [(row, number(row, "top1") - then.get((row["seed"], row["step"]), math.nan)) for row in ours]
    return [[100 * gain for row, gain in ahead if row["seed"] == seed] for seed in seeds(probes)]


def _mean_before_end(gains: list[float]) -> float:
    early = gains[:-1]
    return sum(early) / len(early) if early else math.nan


def _accuracy(probes: Records) -> Plot:
    """Population and batch come first; a corrected average has the colour of the average that was not corrected."""
    found = {series.name: series for series in series_by_arm(probes, "step", "top1", arm="statistics", times=100)}
    corrected = [replace(s, colour=_KINDS.index(s.name.split(",")[0])) for s in found.values() if s.name not in _KINDS]
    return Plot(
        title="Test accuracy on the way by kind of statistics",
        x="steps",
        y="test accuracy, %",
        series=(*(found[kind] for kind in _KINDS), *corrected),
        caption=caption(probes, BAND),
        table="probes",
        log_x=True,
    )


def _by_photos(fewer: Records, text: str) -> dict[str, Plot]:
    about: dict[str, Any] = {
        "x": "photos of train that were measured",
        "caption": text,
        "table": "images",
        "log_x": True,
    }
    distances = {"means, in standard deviations": "mean_off", "variances, logarithm of the ratio": "variance_off"}
    return {
        "photos": Plot(
            title="What statistics of so many photos lose against those of all",
            y="accuracy less that by all, points",
            series=(series_over_seeds("population", fewer, "images", "against_all", times=100),),
            lines=((0.0, "as by all"),),
            **about,
        ),
        "distance": Plot(
            title="How far statistics of so many photos are from those of all",
            y="root mean square over channels",
            series=tuple(series_over_seeds(name, fewer, "images", column) for name, column in distances.items()),
            log_y=True,
            **about,
        ),
    }


STUDY = Study(
    name="inference-statistics",
    title="What inference normalises by",
    claim="""Population statistics, measured with the weights fixed on 1,000 to 10,000 photos, are at least as good for
    inference as the moving averages of training at any time, and better on the way.""",
    source="Ioffe & Szegedy 2015, Alg. 2; Wu & Johnson 2021 (arXiv 2105.07576)",
    protocol="""There is one training for each seed. Statistics for inference do not change how a network trains, so all
    kinds are compared on the same weights. During the training, moving averages are kept of momentum 0.5, 0.1
    (PyTorch's default), 0.01 (TensorFlow's) and 0.001 (the weight of the new batch); they begin as usual with 0 and 1.
    After 5, 20, 50, 100, 200 and 250 steps of 32 photos (full: 5, 20, 100, 500, 2,000, 10,000 and 20,000) the network
    is evaluated on test by each average, by population statistics of all of train (10,000 photos at most), by each
    batch's own statistics, and, as a secondary comparison, by the averages of 0.1 and 0.01 corrected for what they
    began with. At the end population statistics are measured on 8, 16, 32 ... photos too. The paper averages over
    augmented training batches; here the photos are measured as inference sees them, as bnlab does. The learning rate is
    the recipe's; nothing is chosen. A seed whose network ends no better than guessing shows nothing.""",
    rule=f"""There are five clauses, each decided by its 95% interval over seeds. Two are about the average of 0.1, and
    two about that of 0.01. At the worst probed step, population less average (0 where it is never below 0) is above
    {_AT_WORST:g} points: among some 500 test photos, the least of six differences is about 1 point below 0 even if both
    are equally good. The mean of the difference over the steps before the last is above 0. The fifth clause is that
    {_SUFFICE:,} photos lose less than {-_OF_FEWER:g} point against all, which is what two seeds differ by. Where half
    of train is fewer photos than that, the largest power of two up to that half is tested as a secondary clause: it is
    harder, so its failure would say nothing of {_SUFFICE:,}.""",
    measure=measure,
    conclude=conclude,
    min_photos=200,
)
