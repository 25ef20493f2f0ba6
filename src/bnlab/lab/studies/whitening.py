"""Paper 2 and 3: full whitening "is costly". What it costs, and what it gives by the step and by the second."""

import math
import time
from typing import Any

import torch

from bnlab.data.dataset import open_recorded_data
from bnlab.lab.experiment import WITH_BN, Experiment
from bnlab.lab.lr_selection import chosen, lr_remarks
from bnlab.lab.measurements import JobContext
from bnlab.lab.plots import BAND, caption, series_by_arm
from bnlab.lab.records import (
    Records,
    Results,
    Row,
    average,
    gained,
    last,
    learnt_threshold,
    mean,
    number,
    ratios,
    resolution,
    seeds,
    where,
)
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.verdict import Evidence
from bnlab.machine import environment
from bnlab.recipe import Recipe
from bnlab.report.plots import Plot
from bnlab.training.build import build_context, new_network
from bnlab.training.loop import deterministic, train_step
from bnlab.training.memory_advice import batch_errors
from bnlab.training.optimizer import set_learning_rate

RATES = (0.03, 0.1, 0.3)
BN, WHITENING = "batch normalisation", "whitening"
_WARM_UP, _MARGIN = 2, 1.0  # steps; points
_DEARER = 1.1  # times: less is nothing to choose a normalisation by


def measure(experiment: Experiment) -> Results:
    """What a step of each costs, and both trained at each rate; of each judgement the time that its steps took."""
    same: dict[str, Any] = {"steps": experiment.by_budget(150, 6000), "schedule": "constant"}
    norms = {BN: "batch", WHITENING: experiment.by_budget("whitening:10000", "whitening:64")}
    arms = {
        arm: experiment.recipe(experiment.network_pair()[WITH_BN], norm=norm, **same) for arm, norm in norms.items()
    }
    rounds, here = experiment.by_budget(20, 100), environment(experiment.device)
    timing: dict[str, Any] = {
        "norms": {arm: recipe.norm for arm, recipe in arms.items()},
        "rounds": rounds,
        # another machine's times are not this one's
        "machine": {key: here[key] for key in ("processor", "threads", "gpu")},
        "steps": 2 * rounds,
    }
    results = experiment.run(
        [experiment.measurement(costs, seed, recipe=arms[BN], **timing) for seed in experiment.seeds],
        one_at_a_time=True,
    )
    results |= experiment.run_learning_rates(arms, RATES)
    milliseconds = {arm: average(where(results["cost"], arm=arm), "milliseconds") for arm in arms}
    for row in results["accuracy"]:
        row["seconds"] = number(row, "step") * milliseconds[str(row["arm"])] / 1000
    return results


def costs(job: JobContext, recipe: Recipe, norms: dict[str, str], rounds: int, machine: Row) -> Results:
    """The median time of a training step with each normalisation, on the same batch, in turn.

    The networks are made for it and thrown away; at a learning rate of 0 none can diverge, and a step is no cheaper.
    """
    dataset = open_recorded_data(job.split)
    contexts = {}
    for arm, norm in norms.items():
        own = recipe.model_copy(update={"norm": norm})
        network, _ = new_network(own, classes=len(dataset.classes))
        contexts[arm] = build_context(own, network.train(), dataset, job.device)
        set_learning_rate(contexts[arm].optimizer, 0.0)
    pixels, labels = next(contexts[BN].loader.epoch(0, recipe.size))
    seconds: dict[str, list[float]] = {arm: [] for arm in norms}
    with deterministic(job.device), batch_errors(contexts[BN]):
        for step in range(_WARM_UP + rounds):
            for arm, context in contexts.items():
                began = _now(job.device)
                train_step(context, pixels, labels, step)
                seconds[arm].append(_now(job.device) - began)
                job.report_steps(1)
    middle = {arm: sorted(of_arm[_WARM_UP:])[rounds // 2] for arm, of_arm in seconds.items()}
    return {"cost": [{"arm": arm, "milliseconds": 1000 * median, **machine} for arm, median in middle.items()]}


def _now(device: str) -> float:
    if device != "cpu":
        getattr(torch, device).synchronize()
    return time.perf_counter()


def conclude(results: Results) -> Conclusion:
    """What a step costs, and the accuracies at equal time and at equal steps."""
    rows = chosen(results)
    lost = _lost(rows)
    learnt: Records = [row | {"test_top1": math.nan} if row["seed"] in lost else row for row in rows]
    at_time = [_at_equal_time(where(learnt, seed=seed)) for seed in seeds(rows)]
    points: dict[str, Any] = {"above": -_MARGIN, "unit": "points", "resolution": resolution(rows)}
    cost = Evidence(
        what=f"a training step with whitening takes more than {_DEARER:g} times as long",
        values=ratios(results["cost"], WHITENING, BN, last("milliseconds")),
        above=_DEARER,
        unit="times",
        ratio=True,
    )
    by_second = Evidence(
        what=f"at equal time BN's test accuracy is at least whitening's, to {_MARGIN:g} point",
        values=tuple(100 * (ours - theirs) for ours, theirs in at_time),
        **points,
    )
    by_step = Evidence(
        what=f"at equal steps whitening's test accuracy is at least BN's, to {_MARGIN:g} point (Huang et al. 2018)",
        values=gained(learnt, WHITENING, BN, last("test_top1")),
        primary=False,
        **points,
    )
    on_the_way = Evidence(
        what="and so is its average over the training",
        values=gained(learnt, WHITENING, BN, mean("test_top1")),
        primary=False,
        **points,
    )
    return Conclusion(
        evidence=(cost, by_second, by_step, on_the_way),
        plots={
            "steps": _plot(rows, "step", "Accuracy by step", "steps of training"),
            "seconds": _plot(rows, "seconds", "Accuracy by time", "seconds of training steps"),
        },
        numbers={
            f"milliseconds a step, {arm}, mean": average(where(results["cost"], arm=arm), "milliseconds")
            for arm in (BN, WHITENING)
        },
        remarks=(
            *lr_remarks(results),
            *(f"seed {seed}: neither network learnt, so they do not compare" for seed in lost),
        ),
    )


def _lost(rows: Records) -> list[int]:
    """The seeds of which neither network ends above guessing."""
    ends = {(row["arm"], row["seed"]): row for row in rows}.values()
    learnt = {row["seed"] for row in ends if number(row, "test_top1") > learnt_threshold(row)}
    return [seed for seed in seeds(rows) if seed not in learnt]


def _at_equal_time(rows: Records) -> tuple[float, float]:
    """Both accuracies on test at the time when the quicker training ends, read off the curves; NaN without either."""
    curves = [where(rows, arm=arm) for arm in (BN, WHITENING)]
    if not all(curves):
        return math.nan, math.nan
    end = min(number(curve[-1], "seconds") for curve in curves)
    ours, theirs = (_read(curve, end) for curve in curves)
    return ours, theirs


def _read(curve: Records, seconds: float) -> float:
    """The accuracy at a time: straight between two judgements, and from guessing at the beginning to the first."""
    before, top1 = 0.0, number(curve[0], "guess")
    for row in curve:
        after, next_top1 = number(row, "seconds"), number(row, "test_top1")
        if seconds <= after:
            return top1 + (next_top1 - top1) * (seconds - before) / (after - before)
        before, top1 = after, next_top1
    return top1


def _plot(rows: Records, x: str, title: str, label: str) -> Plot:
    return Plot(
        title=title,
        x=label,
        y="right on test, %",
        series=series_by_arm(rows, x, "test_top1", times=100),
        caption=caption(rows, BAND),
        table="accuracy",
    )


STUDY = Study(
    name="whitening",
    title="Whitening",
    claim="""Full whitening of each layer's inputs is costly, so that normalising each channel by itself, as batch
    normalisation does, gives at least as much accuracy for the time.""",
    source="Ioffe & Szegedy 2015, sec. 2 and 3; by the step, against it, Huang et al. 2018",
    protocol="""One network with BN and with ZCA whitening in its place: quick the small Inception at half its width,
    all channels of a layer whitened at once (at most 36, which costs no more than groups of 16); full GoogLeNet, of
    digits the small Inception, channels in groups of 64. Same weights, batches and recipe; 150 steps (full: 6000) at a
    constant learning rate, the best of 0.03, 0.1 and 0.3 by val accuracy, chosen for each arm and seed. The cost is the
    median of 20 steps (full: 100) on one batch, after 2 that do not count, the arms in turn in one process with no
    other measurement beside it, on networks that are thrown away; on a CPU by one thread. Time is steps times the
    seeds' mean cost, without reading photos and judging. The accuracy at equal time is that at the end of the quicker
    training, read off the curves. A seed where both end no better than guessing compares no accuracies.""",
    rule=f"""Two clauses: a step with whitening takes longer by more than a tenth (ratio above {_DEARER:g}), and at
    equal time BN's accuracy on test less whitening's is above -1 point, which is five photos of 540. Each by its 95%
    interval over seeds. By the step, where Huang et al. have whitening converge at least as well, is told beside.""",
    measure=measure,
    conclude=conclude,
)
