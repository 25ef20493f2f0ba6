"""Santurkar et al. 2018, Fig. 4: does batch normalisation make the loss smoother along the gradient?"""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from torch import Tensor

from bnlab.errors import plural
from bnlab.lab.clauses import LearntFilter, ratio_clause
from bnlab.lab.experiment import WITH_BN, WITHOUT_BN, Experiment
from bnlab.lab.lr_selection import chosen, lr_remarks
from bnlab.lab.measurements import JobContext
from bnlab.lab.plots import BAND, series_by_arm
from bnlab.lab.records import Pick, Records, Results, Row, mean, number, numbers, ratios, seeds, where
from bnlab.lab.replay import Batch, batch_at, is_probe_step, loss_and_gradients, replaying, set_parameters
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.trained_network import Probe, train
from bnlab.lab.verdict import Evidence
from bnlab.recipe import Recipe
from bnlab.report.plots import Plot
from bnlab.training.build import TrainingContext

RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
EQUAL = 0.01  # the rate of a secondary comparison, in which both arms have the same
MULTIPLES = (0.5, 1.0, 2.0, 4.0)
COMMON = 0.03  # the learning rate whose multiples are the step lengths that both networks are probed at
LENGTHS = ("common", "own")
_PROBE_STEPS = 10  # in each training
_MEASURES = {
    "range": "range of the loss, nats",
    "change": "largest change of the gradient",
    "beta": "effective beta",
    "relative": "largest change of the gradient over its length",
}


def measure(experiment: Experiment) -> Results:
    """Trains both networks at each rate, and measures the loss along the gradient during the training."""
    same: dict[str, Any] = {"steps": experiment.by_budget(150, 10_000), "dropout": 0.0, "validate_every": 100_000}
    if experiment.budget == "quick" and experiment.splits.kind == "digits":
        same["size"] = 16
    networks = experiment.network_pair()
    arms = {arm: experiment.recipe(networks[arm], **same) for arm in (WITHOUT_BN, WITH_BN)}
    return experiment.run_learning_rates(arms, RATES, train_probed)


def train_probed(job: JobContext, recipe: Recipe) -> Results:
    """One training, with measurements along the gradient at some of its steps."""
    probe = LossAlongGradient(_PROBE_STEPS)
    train(job, recipe, probe=probe)
    return {"accuracy": probe.results["accuracy"], "smoothness": probe.results.get("smoothness", [])}


class LossAlongGradient(Probe):
    """Measures, before a step, its batch's loss and gradient at several lengths along the negative gradient.

    The lengths are multiples of `COMMON`, and of the learning rate that the step will have.
    """

    def __init__(self, probe_steps: int) -> None:
        super().__init__()
        self.probe_steps = probe_steps

    def before(self, step: int, context: TrainingContext) -> None:
        if not is_probe_step(step, context, self.probe_steps):
            return
        rates = {"common": COMMON, "own": float(context.optimizer.param_groups[-1]["lr"])}
        batch = batch_at(step, context)
        with replaying(context):
            for lengths, rate in rates.items():
                row = along(context, batch, step, [rate * multiple for multiple in MULTIPLES])
                if row is not None:
                    self.write("smoothness", row | {"step": step, "lengths": lengths, "rate": rate})


def along(context: TrainingContext, batch: Batch, step: int, lengths: Sequence[float]) -> Row | None:
    """The loss and its gradient at W - length * G, for the gradient G at the weights W; W is restored.

    range: the highest less the lowest loss, including that at W. change: the largest ||G' - G||. beta: the largest
    ||G' - G|| / ||length * G||. relative: change / ||G||. None if the loss or the gradient at W is not finite; if they
    are not finite further on, the range and the changes are infinite.
    """
    named = {name: p for name, p in context.network.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in named.items()}
    loss, found = loss_and_gradients(context, batch, list(named.values()), step)
    size = _norm(found)
    if not (math.isfinite(loss) and math.isfinite(size) and size > 0):
        return None
    losses, changes, betas = [loss], [], []
    for length in lengths:
        set_parameters(named, {name: start[name] - length * g for name, g in zip(named, found, strict=True)})
        there, turned = loss_and_gradients(context, batch, list(named.values()), step)
        change = _norm([new - old for new, old in zip(turned, found, strict=True)])
        finite = math.isfinite(there) and math.isfinite(change)
        losses.append(there if finite else math.inf)
        changes.append(change if finite else math.inf)
        betas.append(changes[-1] / (length * size))
    set_parameters(named, start)
    return {
        "loss": loss,
        "gradient": size,
        "range": max(losses) - min(losses),
        "change": max(changes),
        "beta": max(betas),
        "relative": max(changes) / size,
    }


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def conclude(results: Results) -> Conclusion:
    """Compares how rough the loss is with BN and without."""
    accuracies = chosen(results)
    learnt, learnt_equal = LearntFilter(accuracies), LearntFilter(where(results["accuracy"], learning_rate=EQUAL))
    common, own = (where(chosen(results, "smoothness"), lengths=lengths) for lengths in LENGTHS)
    equal = where(results["smoothness"], learning_rate=EQUAL, lengths="common")
    primary = ("range", "change", "beta")

    def clause(measure: str, rows: Records, comparison: str) -> Evidence:
        values = ratios(rows, WITH_BN, WITHOUT_BN, _median(measure))
        return ratio_clause(
            f"{_MEASURES[measure].split(',')[0]}, with BN over without{comparison}",
            (learnt_equal if rows is equal else learnt).only(values, WITH_BN, WITHOUT_BN),
            below=1.0,
            primary=rows is common and measure in primary,
        )

    return Conclusion(
        evidence=(
            *(clause(measure, common, ", at the same step lengths") for measure in _MEASURES),
            *(clause(measure, own, ", at each one's own learning rate") for measure in _MEASURES),
            *(clause(measure, equal, f", both trained at {EQUAL:g}") for measure in primary),
        ),
        plots={
            f"{measure} {lengths}": _plot(rows, measure, lengths)
            for lengths, rows, measures in (("common", common, _MEASURES), ("own", own, ("range", "relative")))
            for measure in measures
        },
        numbers={
            f"{name} {arm}, mean": mean(column)(where(accuracies, arm=arm))
            for name, column in (("learning rate", "learning_rate"), ("test accuracy", "test_top1"))
            for arm in (WITHOUT_BN, WITH_BN)
        },
        remarks=(*learnt.remarks, *lr_remarks(results)),
    )


def _median(column: str) -> Pick:
    """Picks the median over the steps, which a few infinite values do not move far."""
    return lambda rows: median(numbers(rows, column))


def _plot(rows: Records, measure: str, lengths: str) -> Plot:
    multiples = f"{MULTIPLES[0]:g} to {MULTIPLES[-1]:g} times"
    base = f"{COMMON:g}" if lengths == "common" else "the learning rate of the step"
    return Plot(
        title=f"Along the gradient: {_MEASURES[measure].split(',')[0]}",
        x="steps",
        y=_MEASURES[measure],
        series=series_by_arm([row for row in rows if math.isfinite(number(row, measure))], "step", measure),
        caption=f"{plural(len(seeds(rows)), 'seed')}, step lengths {multiples} {base}; {BAND}",
        table="smoothness",
        log_y=True,
    )


STUDY = Study(
    name="smoothness",
    title="Smoothness along the gradient",
    claim="""Batch normalisation makes the loss smoother: along the gradient the loss varies less, and the gradient
    changes less and is more predictive.""",
    source="Santurkar et al. 2018, How Does Batch Normalization Help Optimization?, sec. 3 and Fig. 4",
    protocol=f"""One network is trained with BN and without, for 150 steps (full: 10,000) of the recipe for the photos
    (quick, digits: at 16 px), without dropout. The initial weights and batches are the same, except that without BN
    the weights are scaled on a batch so that each layer begins with outputs of mean square 1. The learning rate is the
    best of {", ".join(f"{rate:g}" for rate in RATES)} by val accuracy, for each arm and seed. Before each of
    {_PROBE_STEPS} steps, the batch's loss and gradient are computed at W - length * G, for the gradient G at the
    weights W. The lengths are {", ".join(f"{multiple:g}" for multiple in MULTIPLES)} times {COMMON:g}, the same for
    both networks, and as many times the learning rate of the step. The range is the highest less the lowest loss; the
    change is the largest ||G' - G||; the effective beta is the largest ||G' - G|| / ||length * G||. The study takes the
    median of each over the steps; a loss that is not finite counts as infinite. Santurkar et al. trained VGG on
    CIFAR-10 and took [1/2, 4] times the learning rate.""",
    rule="""There are three clauses, all at the same step lengths: the range, the change and the effective beta are
    smaller with BN (the ratio is below 1). Each is decided by its 95% interval over seeds, of the logarithms. A seed in
    which an arm ends no better than guessing shows nothing.""",
    measure=measure,
    conclude=conclude,
)
