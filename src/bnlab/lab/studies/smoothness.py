"""Santurkar et al. 2018, Fig. 4: does batch normalisation make the loss smoother along the gradient?"""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from torch import Tensor

from bnlab.lab.clauses import LearntFilter, ratio_clause, secondary
from bnlab.lab.experiment import WITH_BN, WITHOUT_BN, Experiment
from bnlab.lab.lr_selection import chosen, lr_remarks
from bnlab.lab.measurements import JobContext
from bnlab.lab.plots import BAND, caption, series_by_arm
from bnlab.lab.records import Records, Results, Row, average, number, numbers, ratios, where
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
_MEASURES = {
    "range": "range of the loss, nats",
    "change": "largest change of the gradient",
    "beta": "effective beta",
    "relative": "largest change of the gradient over its length",
}
_PRIMARY = ("range", "change", "beta")


def measure(experiment: Experiment) -> Results:
    """Trains both networks at each rate, and measures the loss along the gradient during the training."""
    same: dict[str, Any] = {"steps": experiment.by_budget(150, 10_000), "dropout": 0.0, "validate_every": 100_000}
    if experiment.budget == "quick" and experiment.splits.kind == "digits":
        same["size"] = 16
    arms = {arm: experiment.recipe(experiment.network_pair()[arm], **same) for arm in (WITHOUT_BN, WITH_BN)}
    return experiment.run_learning_rates(arms, RATES, train_probed)


def train_probed(job: JobContext, recipe: Recipe) -> Results:
    return {"accuracy": [], "smoothness": []} | train(job, recipe, probe=LossAlongGradient()).results


class LossAlongGradient(Probe):
    """Measures, before a step, its batch's loss and gradient at several lengths along the negative gradient.

    The lengths are multiples of `COMMON`, and of the learning rate that the step will have.
    """

    probe_steps = 10  # in each training

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
        if not (math.isfinite(there) and math.isfinite(change)):
            there = change = math.inf
        losses.append(there)
        changes.append(change)
        betas.append(change / (length * size))
    set_parameters(named, start)
    changed = max(changes)
    of_loss = {"loss": loss, "gradient": size, "range": max(losses) - min(losses)}
    return {**of_loss, "change": changed, "beta": max(betas), "relative": changed / size}


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def conclude(results: Results) -> Conclusion:
    """Compares how rough the loss is with BN and without, by the median over the steps of each measure.

    A few infinite values do not move a median far.
    """
    accuracies = chosen(results)
    learnt = LearntFilter(accuracies)
    common, own = (where(chosen(results, "smoothness"), lengths=lengths) for lengths in LENGTHS)
    equal = where(results["smoothness"], learning_rate=EQUAL, lengths="common")
    learnt_equal = LearntFilter(where(results["accuracy"], learning_rate=EQUAL))

    def clause(measure: str, rows: Records, comparison: str, learnt: LearntFilter = learnt) -> Evidence:
        values = ratios(rows, WITH_BN, WITHOUT_BN, lambda of_arm: median(numbers(of_arm, measure)))
        what = f"{_MEASURES[measure].split(',')[0]}, with BN over without{comparison}"
        return ratio_clause(what, learnt.only(values, WITH_BN, WITHOUT_BN), below=1.0)

    at_common, at_own = ", at the same step lengths", ", at each one's own learning rate"
    return Conclusion(
        evidence=(
            *(clause(measure, common, at_common) for measure in _PRIMARY),
            *secondary(
                clause("relative", common, at_common),
                *(clause(measure, own, at_own) for measure in _MEASURES),
                *(clause(measure, equal, f", both trained at {EQUAL:g}", learnt_equal) for measure in _PRIMARY),
            ),
        ),
        plots={
            f"{measure} {lengths}": Plot(
                title=f"Along the gradient: {_MEASURES[measure].split(',')[0]}",
                x="steps",
                y=_MEASURES[measure],
                series=series_by_arm([row for row in rows if math.isfinite(number(row, measure))], "step", measure),
                caption=caption(rows, BAND, f"step lengths {MULTIPLES[0]:g} to {MULTIPLES[-1]:g} times {base}"),
                table="smoothness",
                log_y=True,
            )
            for lengths, rows, base, measures in (
                ("common", common, f"{COMMON:g}", _MEASURES),
                ("own", own, "the learning rate of the step", ("range", "relative")),
            )
            for measure in measures
        },
        numbers={
            f"{name} {arm}, mean": average(where(accuracies, arm=arm), column)
            for name, column in (("learning rate", "learning_rate"), ("test accuracy", "test_top1"))
            for arm in (WITHOUT_BN, WITH_BN)
        },
        remarks=(*learnt.remarks, *lr_remarks(results)),
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
    {LossAlongGradient.probe_steps} steps, the batch's loss and gradient are computed at W - length * G, for the
    gradient G at the weights W. The lengths are {", ".join(f"{multiple:g}" for multiple in MULTIPLES)} times
    {COMMON:g}, the same for both networks, and as many times the learning rate of the step. The range is the highest
    less the lowest loss; the change is the largest ||G' - G||; the effective beta is the largest
    ||G' - G|| / ||length * G||. The study takes the median of each over the steps; a loss that is not finite counts as
    infinite. Santurkar et al. trained VGG on CIFAR-10 and took [1/2, 4] times the learning rate.""",
    rule="""There are three clauses, all at the same step lengths: the range, the change and the effective beta are
    smaller with BN (the ratio is below 1). Each is decided by its 95% interval over seeds, of the logarithms. A seed in
    which an arm ends no better than guessing shows nothing.""",
    measure=measure,
    conclude=conclude,
)
