"""Santurkar et al. 2018, Fig. 4: does batch normalisation make the loss smoother along the gradient?"""

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from torch import Tensor

from bnlab.errors import plural
from bnlab.lab.experiment import WITH_BN, WITHOUT_BN, Experiment
from bnlab.lab.lr_selection import LearntFilter, chosen, lr_remarks
from bnlab.lab.measurements import JobContext
from bnlab.lab.plots import BAND, series_by_arm
from bnlab.lab.records import Records, Results, Row, mean, number, numbers, ratios, seeds, where
from bnlab.lab.replay import Batch, batch_at, is_probe_step, loss_and_gradients, replaying, set_parameters
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.trained_network import Probe, train
from bnlab.lab.verdict import Evidence
from bnlab.recipe import Recipe
from bnlab.report.plots import Plot
from bnlab.training.build import TrainingContext

RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
EQUAL = 0.01  # the rate at which arms are compared too
MULTIPLES = (0.5, 1.0, 2.0, 4.0)
COMMON = 0.03  # the learning rate whose multiples are the step lengths that both networks are probed at
LENGTHS = ("common", "own")
_LOOKS = 10  # in each training
_MEASURES = {
    "range": "range of the loss, nats",
    "change": "largest change of the gradient",
    "beta": "effective beta",
    "relative": "largest change of the gradient over its length",
}


def measure(experiment: Experiment) -> Results:
    """Both networks at each rate; on the way, the loss along the gradient."""
    same: dict[str, Any] = {"steps": experiment.by_budget(150, 10_000), "dropout": 0.0, "validate_every": 100_000}
    if experiment.budget == "quick" and experiment.splits.kind == "digits":
        same["size"] = 16
    networks = experiment.network_pair()
    arms = {arm: experiment.recipe(networks[arm], **same) for arm in (WITHOUT_BN, WITH_BN)}
    return experiment.run_learning_rates(arms, RATES, probed)


def probed(job: JobContext, recipe: Recipe) -> Results:
    """One training, probed on the way."""
    probe = LossAlongGradient(_LOOKS)
    train(job, recipe, probe=probe)
    return {"accuracy": probe.results["accuracy"], "smoothness": probe.results.get("smoothness", [])}


class LossAlongGradient(Probe):
    """Before a step, its batch's loss and gradient at several lengths along the negative gradient.

    Lengths are multiples of `COMMON`, and of the learning rate that the step will have.
    """

    def __init__(self, probe_steps: int) -> None:
        super().__init__()
        self.probe_steps = probe_steps

    def before(self, step: int, context: TrainingContext) -> None:
        """Probe, where it is time."""
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
    """What is met at W - length * G, for the gradient G at the weights W, which are put back.

    range: the highest less the lowest loss, that at W among them; change: the largest ||G' - G||; beta: the largest
    ||G' - G|| / ||length * G||; relative: change / ||G||. None where a loss or a gradient is no finite number at W;
    where it is none further on, the range and the changes are infinite.
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
    """How many times as rough the loss is with BN as without."""
    rows = chosen(results, "smoothness")
    accuracies = chosen(results)
    equal = where(results["smoothness"], learning_rate=EQUAL, lengths="common")
    learnt, learnt_so = LearntFilter(accuracies), LearntFilter(where(results["accuracy"], learning_rate=EQUAL))
    decisive = ("range", "change", "beta")

    def clause(measure: str, which: Records, said: str, *, primary: bool = False) -> Evidence:
        return Evidence(
            what=f"{_MEASURES[measure].split(',')[0]}, with BN over without{said}",
            values=(learnt_so if which is equal else learnt).only(
                ratios(which, WITH_BN, WITHOUT_BN, _median(measure)), WITH_BN, WITHOUT_BN
            ),
            below=1.0,
            unit="times",
            ratio=True,
            primary=primary,
        )

    common, own = (where(rows, lengths=lengths) for lengths in LENGTHS)
    return Conclusion(
        evidence=(
            *(clause(measure, common, ", at the same step lengths", primary=True) for measure in decisive),
            clause("relative", common, ", at the same step lengths"),
            *(clause(measure, own, ", at each one's own learning rate") for measure in decisive),
            clause("relative", own, ", at each one's own learning rate"),
            *(clause(measure, equal, f", both trained at {EQUAL:g}") for measure in decisive),
        ),
        plots={
            f"{measure} {lengths}": _plot(where(rows, lengths=lengths), measure, lengths)
            for lengths, measures in (("common", (*decisive, "relative")), ("own", ("range", "relative")))
            for measure in measures
        },
        numbers={
            f"{name} {arm}, mean": mean(column)(where(accuracies, arm=arm))
            for name, column in (("learning rate", "learning_rate"), ("test accuracy", "test_top1"))
            for arm in (WITHOUT_BN, WITH_BN)
        },
        remarks=(*learnt.remarks, *lr_remarks(results)),
    )


def _median(column: str) -> Callable[[Records], float]:
    """Picks the median over the steps, which a step whose way ends in no number does not move far."""
    return lambda rows: median(numbers(rows, column))


def _plot(rows: Records, measure: str, lengths: str) -> Plot:
    multiples = f"{MULTIPLES[0]:g} to {MULTIPLES[-1]:g} times"
    way = f"{COMMON:g}" if lengths == "common" else "the learning rate of the step"
    return Plot(
        title=f"Along the gradient: {_MEASURES[measure].split(',')[0]}",
        x="steps",
        y=_MEASURES[measure],
        series=series_by_arm([row for row in rows if math.isfinite(number(row, measure))], "step", measure),
        caption=f"{plural(len(seeds(rows)), 'seed')}, step lengths {multiples} {way}; {BAND}",
        table="smoothness",
        log_y=True,
    )


STUDY = Study(
    name="smoothness",
    title="Smoothness along the gradient",
    claim="""Batch normalisation makes the loss smoother: along the gradient the loss varies less, and the gradient
    changes less and is more predictive.""",
    source="Santurkar et al. 2018, How Does Batch Normalization Help Optimization?, sec. 3 and Fig. 4",
    protocol=f"""One network with BN and without, 150 steps (full: 10,000) of the recipe for the photos (quick,
    digits: at 16 px), without dropout; same initial weights and batches (without BN the weights are scaled on a batch
    so that each layer begins with outputs of a mean square of 1), the learning rate the best of
    {", ".join(f"{rate:g}" for rate in RATES)} by val for each arm and seed. Before each of {_LOOKS} steps, the batch's
    loss and gradient at W - length * G, for the gradient G at the weights W and lengths of
    {", ".join(f"{multiple:g}" for multiple in MULTIPLES)} times {COMMON:g}, the same for both networks, and of as many
    times the learning rate that the step has. Range: highest less lowest loss. Change: the largest ||G' - G||.
    Effective beta: the largest ||G' - G|| / ||length * G||. Of each the median over the steps; where a loss is no
    finite number it counts as infinite. Santurkar et al. trained VGG on CIFAR-10 and probed [1/2, 4] times the
    learning rate.""",
    rule="""Three clauses, all at the same step lengths: range, change and effective beta are smaller with BN (ratio
    below 1). Each by its 95% interval over seeds, of the logarithms. A seed in which an arm ends no better than
    guessing gives no number.""",
    measure=measure,
    conclude=conclude,
)
