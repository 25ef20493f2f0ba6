"""Paper 2 and 3: full whitening "is costly". What it costs, and what accuracy it gives by the step and by time."""

import math
import time
from functools import partial
from statistics import median_high
from typing import Any

import numpy as np
import torch

from bnlab.data.dataset import open_recorded_data
from bnlab.lab.clauses import points_clause, ratio_clause, secondary, seeds_that_learnt_nothing, without_seeds
from bnlab.lab.experiment import WITH_BN, Experiment
from bnlab.lab.lr_selection import chosen, lr_remarks
from bnlab.lab.measurements import JobContext
from bnlab.lab.plots import accuracy_curves
from bnlab.lab.records import Records, Results, Row, average, gained, last, mean, number, numbers, ratios, seeds, where
from bnlab.lab.study import Conclusion, Study
from bnlab.machine import environment
from bnlab.recipe import Recipe
from bnlab.training.build import build_context, new_network
from bnlab.training.loop import deterministic, train_step
from bnlab.training.memory_advice import batch_errors
from bnlab.training.optimizer import set_learning_rate

RATES = (0.03, 0.1, 0.3)
BN, WHITENING = "batch normalisation", "whitening"
_WARM_UP, _MARGIN = 2, 1.0  # steps; points
_SLOWER = 1.1  # times as long: a smaller difference would not matter to anybody's choice


def measure(experiment: Experiment) -> Results:
    """Times a step of each, and trains both at each rate; adds to each validation the time that its steps took."""
    same: dict[str, Any] = {"steps": experiment.by_budget(150, 6000), "schedule": "constant"}
    norms = {BN: "batch", WHITENING: experiment.by_budget("whitening:10000", "whitening:64")}
    network = experiment.network_pair()[WITH_BN]
    arms = {arm: experiment.recipe(network, norm=norm, **same) for arm, norm in norms.items()}
    rounds, here = experiment.by_budget(20, 100), environment(experiment.device)
    # The key of the measurement depends on this, so that times of another machine are not used.
    machine = {key: here[key] for key in ("processor", "threads", "gpu")}
    timing: dict[str, Any] = {"norms": norms, "rounds": rounds, "machine": machine, "steps": 2 * rounds}
    measurements = [experiment.measurement(costs, seed, recipe=arms[BN], **timing) for seed in experiment.seeds]
    results = experiment.run(measurements, one_at_a_time=True)
    results |= experiment.run_learning_rates(arms, RATES)
    milliseconds = {arm: average(where(results["cost"], arm=arm), "milliseconds") for arm in arms}
    for row in results["accuracy"]:
        row["seconds"] = number(row, "step") * milliseconds[str(row["arm"])] / 1000
    return results


def costs(job: JobContext, recipe: Recipe, norms: dict[str, str], rounds: int, machine: Row) -> Results:
    """The median time of a training step with each normalisation, on the same batch, in turn.

    The networks serve only for this. Their learning rate is 0: so none can diverge, and a step costs as much.
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
    medians = {arm: median_high(of_arm[_WARM_UP:]) for arm, of_arm in seconds.items()}
    return {"cost": [{"arm": arm, "milliseconds": 1000 * median, **machine} for arm, median in medians.items()]}


def _now(device: str) -> float:
    if device != "cpu":
        getattr(torch, device).synchronize()
    return time.perf_counter()


def conclude(results: Results) -> Conclusion:
    rows = chosen(results)
    lost = seeds_that_learnt_nothing(rows)
    learnt = without_seeds(rows, lost, "test_top1")
    points = partial(points_clause, tested=rows, above=-_MARGIN)
    to_margin = f"to {_MARGIN:g} point"
    return Conclusion(
        evidence=(
            ratio_clause(
                f"a training step with whitening takes more than {_SLOWER:g} times as long",
                ratios(results["cost"], WHITENING, BN, last("milliseconds")),
                above=_SLOWER,
            ),
            points(
                f"at equal time BN's test accuracy is at least whitening's, {to_margin}",
                [_lead_at_equal_time(where(learnt, seed=seed)) for seed in seeds(rows)],
            ),
            *secondary(
                points(
                    f"at equal steps whitening's test accuracy is at least BN's, {to_margin} (Huang et al. 2018)",
                    gained(learnt, WHITENING, BN, last("test_top1")),
                ),
                points("and so is its average over the training", gained(learnt, WHITENING, BN, mean("test_top1"))),
            ),
        ),
        plots={
            "steps": accuracy_curves(rows, "Accuracy by step", label="steps of training"),
            "seconds": accuracy_curves(rows, "Accuracy by time", x="seconds", label="seconds of training steps"),
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


def _lead_at_equal_time(rows: Records) -> float:
    """By how many points BN's test accuracy is above whitening's when the faster training ends.

    Accuracies are interpolated linearly between validations, and from guessing at 0 seconds to the first. NaN if one of
    the networks was not trained.
    """
    curves = [where(rows, arm=arm) for arm in (BN, WHITENING)]
    if not all(curves):
        return math.nan
    end = min(number(curve[-1], "seconds") for curve in curves)
    ours, theirs = (
        np.interp(end, [0.0, *numbers(rows, "seconds")], [number(rows[0], "guess"), *numbers(rows, "test_top1")])
        for rows in curves
    )
    return 100 * float(ours - theirs)


STUDY = Study(
    name="whitening",
    title="Whitening",
    claim="""Full whitening of each layer's inputs is costly, so that normalising each channel by itself, as batch
    normalisation does, gives at least as much accuracy for the time.""",
    source="Ioffe & Szegedy 2015, sec. 2 and 3; by the step, against it, Huang et al. 2018",
    protocol="""One network is trained with BN and with ZCA whitening in its place. Quick, it is the small Inception at
    half its width, and all channels of a layer are whitened at once (36 at most, which costs no more than groups of
    16); full, it is GoogLeNet (for digits the small Inception), with channels in groups of 64. Weights, batches and
    recipe are the same: 150 steps (full: 6000) at a constant learning rate, the best of 0.03, 0.1 and 0.3 by val
    accuracy, chosen for each arm and seed. The cost is the median of 20 steps (full: 100) on one batch, after 2 steps
    that do not count. The arms take turns in one process while nothing else is measured, on networks that serve only
    for this, and on a CPU with one thread. Time is the number of steps times the seeds' mean cost; it leaves out
    reading photos and validating. The accuracy at equal time is the one at the end of the faster training, interpolated
    between validations. A seed where both end no better than guessing compares no accuracies.""",
    rule=f"""There are two clauses. A step with whitening takes longer by more than a tenth (the ratio is above
    {_SLOWER:g}); and at equal time BN's test accuracy less whitening's is above -1 point, which is five photos of 540.
    Each is decided by its 95% interval over seeds. The accuracy by the step, where Huang et al. find that whitening
    converges at least as well, is secondary.""",
    measure=measure,
    conclude=conclude,
)
