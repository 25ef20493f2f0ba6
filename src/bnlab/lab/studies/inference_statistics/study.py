"""Paper, Alg. 2, and Wu & Johnson 2021: population statistics against moving averages, and from how many photos."""

import math
from dataclasses import replace
from typing import Any

from bnlab.data.dataset import open_recorded_data
from bnlab.lab.experiment import WITH_BN, Experiment
from bnlab.lab.measurements import JobContext
from bnlab.lab.plots import BAND, caption, series_by_arm, series_over_seeds
from bnlab.lab.records import (
    Records,
    Results,
    by_seed,
    last,
    learnt_threshold,
    mean,
    number,
    numbers,
    resolution,
    seeds,
    where,
)
from bnlab.lab.studies.inference_statistics.ema_statistics import BATCH, MOMENTA, POPULATION, USUAL, EmaStatistics
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.trained_network import train
from bnlab.lab.verdict import Evidence
from bnlab.recipe import Recipe
from bnlab.report.plots import Plot

_SUFFICE = 1024  # photos that are claimed to
_AT_WORST, _OF_FEWER = -2.0, -1.0  # points: margins, see the rule


def measure(experiment: Experiment) -> Results:
    """One training a seed: statistics do not change how a network trains, so all kinds are compared on the same."""
    # What the layers keep at a momentum of 1 is the last batch's statistics, as they are.
    recipe = experiment.recipe(
        experiment.network_pair()[WITH_BN],
        steps=experiment.by_budget(250, 20_000),
        validate_every=10**6,
        norm_momentum=1.0,
    )
    probes = experiment.by_budget((5, 20, 50, 100, 200), (5, 20, 100, 500, 2000, 10_000))
    return experiment.run(experiment.measurements({"one": recipe}, probed, probes=list(probes)))


def probed(job: JobContext, recipe: Recipe, probes: list[int]) -> Results:
    """One training, its network evaluated after so many steps and at its end."""
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
    """Population statistics against the usual averages, and few photos against all."""
    probes, images = results["probes"], results["images"]
    lost = _lost(results)
    learnt: Records = [row | {"top1": math.nan} if row["seed"] in lost else row for row in probes]
    points: dict[str, Any] = {"unit": "points", "resolution": resolution(probes)}
    clauses = []
    for momentum in USUAL:
        kind = f"average {momentum:g}"
        clauses += [
            Evidence(
                what=f"at its worst probed step population is at least as good as the moving average of {momentum:g}",
                values=tuple(map(_least, _gains(learnt, kind))),
                above=_AT_WORST,
                **points,
            ),
            _on_the_way(learnt, kind, points, primary=True),
            _on_the_way(learnt, f"{kind}, corrected", points, primary=False),
        ]
    few = _few(images)
    fewer: Records = [row | {"against_all": math.nan} if row["seed"] in lost else row for row in _apart(images)]
    clauses.append(
        Evidence(
            what=f"statistics of {few} photos are as good as those of all",
            values=tuple(100 * loss for loss in by_seed(fewer, last("against_all"), images=few)),
            above=_OF_FEWER,
            primary=few >= _SUFFICE,
            **points,
        )
    )
    plots = {
        "accuracy": _accuracy(probes),
        "photos": _by_photos(
            images,
            "What statistics of so many photos lose against those of all",
            "accuracy less that by all, points",
            {"population": "against_all"},
            lines=((0.0, "as by all"),),
        ),
        "distance": _by_photos(
            images,
            "How far statistics of so many photos are from those of all",
            "root mean square over channels",
            {"means, in standard deviations": "mean_off", "variances, logarithm of the ratio": "variance_off"},
            log_y=True,
        ),
    }
    return Conclusion(
        evidence=tuple(clauses),
        plots={name: plot for name, plot in plots.items() if any(series.x for series in plot.series)},
        numbers={
            f"test accuracy at the end, {kind}, %": 100 * mean("top1")(_ends(where(probes, statistics=kind)))
            for kind in (POPULATION, BATCH, *(f"average {m:g}" for m in MOMENTA))
        },
        remarks=(
            *([f"train has too few photos to hold {_SUFFICE} against: {few} were, beside"] if few < _SUFFICE else []),
            *(f"seed {seed}: the training diverged or taught nothing, so it shows nothing" for seed in lost),
        ),
    )


def _lost(results: Results) -> list[int]:
    """The seeds whose network ends no better than guessing: all statistics are as good to it."""
    ends = [row for row in _ends(results["accuracy"]) if number(row, "test_top1") <= learnt_threshold(row)]
    return seeds(ends)


def _gains(probes: Records, statistics: str) -> list[list[float]]:
    """By how many points population statistics are ahead at each probed step, seed by seed."""
    ours, theirs = (where(probes, statistics=kind) for kind in (POPULATION, statistics))
    then = {(row["seed"], row["step"]): number(row, "top1") for row in theirs}
    ahead = [(row, number(row, "top1") - then.get((row["seed"], row["step"]), math.nan)) for row in ours]
    return [[100 * gain for row, gain in ahead if row["seed"] == seed] for seed in seeds(probes)]


def _least(gains: list[float]) -> float:
    """Of the gains and 0; NaN where one is."""
    return min(0.0, *gains) if gains and all(map(math.isfinite, gains)) else math.nan


def _on_the_way(probes: Records, kind: str, points: dict[str, Any], *, primary: bool) -> Evidence:
    values = tuple(sum(early) / len(early) if (early := gains[:-1]) else math.nan for gains in _gains(probes, kind))
    what = f"on the way population is better than the moving {kind.replace('average', 'average of', 1)}"
    return Evidence(what=what, values=values, above=0.0, primary=primary, **points)


def _few(images: Records) -> int:
    """What is claimed to suffice, or, where that is more than half of all, the most that is not."""
    half = min(min(numbers(images, "of")) / 2, _SUFFICE)
    tried = numbers(images, "images")
    return int(max((n for n in tried if n <= half), default=min(tried)))


def _ends(rows: Records) -> Records:
    return list({row["seed"]: row for row in rows}.values())


def _apart(images: Records) -> Records:
    return [row for row in images if row["images"] != row["of"]]


def _accuracy(probes: Records) -> Plot:
    """Population and batch first; an average that was corrected in the colour of the one that was not."""
    kinds = [POPULATION, BATCH, *(f"average {momentum:g}" for momentum in MOMENTA)]
    found = {series.name: series for series in series_by_arm(probes, "step", "top1", arm="statistics", times=100)}
    corrected = [replace(s, colour=kinds.index(s.name.split(",")[0])) for s in found.values() if s.name not in kinds]
    return Plot(
        title="Test accuracy on the way by kind of statistics",
        x="steps",
        y="right on test, %",
        series=(*(found[kind] for kind in kinds), *corrected),
        caption=caption(probes, BAND),
        table="probes",
        log_x=True,
    )


def _by_photos(images: Records, title: str, y: str, columns: dict[str, str], **how: Any) -> Plot:
    times = 100 if "against_all" in columns.values() else 1
    rows = _apart(images)
    return Plot(
        title=title,
        x="photos of train that were measured",
        y=y,
        series=tuple(series_over_seeds(name, rows, "images", column, times=times) for name, column in columns.items()),
        caption=caption(images, f"at the end of training; {BAND}"),
        table="images",
        log_x=True,
        **how,
    )


STUDY = Study(
    name="inference-statistics",
    title="What inference normalises by",
    claim="""Population statistics, measured with the weights fixed on 1,000 to 10,000 photos, are at least as good for
    inference as the moving averages of training at any time, and better on the way.""",
    source="Ioffe & Szegedy 2015, Alg. 2; Wu & Johnson 2021 (arXiv 2105.07576)",
    protocol="""One training a seed: statistics for inference do not change how a network trains, so all kinds are
    compared on the same weights. Moving averages of momentum 0.5, 0.1 (PyTorch's default), 0.01 (TensorFlow's) and
    0.001 (the weight of the new batch) are kept beside it, from the usual beginning of 0 and 1. After 5, 20, 50, 100,
    200 and 250 steps of 32 photos (full: 5, 20, 100, 500, 2,000, 10,000 and 20,000) the network is evaluated on test by
    each, by population statistics of all of train (10,000 photos at most) and by each batch's own; beside these by the
    averages of 0.1 and 0.01 without their share of what they began with. At the end population statistics are measured
    on 8, 16, 32 ... photos too. The paper averages over augmented training batches; here photos are measured as
    inference sees them, as bnlab does. The learning rate is the recipe's; nothing is chosen. A seed whose network ends
    no better than guessing shows nothing.""",
    rule=f"""Five clauses, each by its 95% interval over seeds. For the averages of 0.1 and of 0.01: the least
    difference over the probed steps (population less average; 0 where none is below) is above {_AT_WORST:g} points, for
    among some 500 test photos the least of six differences is about 1 below 0 where both are equally good; and its mean
    over the steps before the last is above 0. And {_SUFFICE:,} photos lose less than {-_OF_FEWER:g} point against all:
    what two seeds differ by. Where half of train is fewer, the largest power of two up to that half stands in, beside:
    that is harder, so that its failure would say nothing of {_SUFFICE:,}.""",
    measure=measure,
    conclude=conclude,
    min_photos=200,
)
