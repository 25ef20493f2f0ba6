"""Paper 3.2 and 2: a bias before BN does nothing; a bias before a mean that the gradient ignores grows without end."""

import dataclasses
import math
from contextlib import ExitStack
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab.errors import ShapeError, plural
from bnlab.lab.clauses import points_clause, ratio_clause
from bnlab.lab.experiment import PLAIN_DESCENT, WITH_BN, Experiment
from bnlab.lab.measurements import JobContext
from bnlab.lab.plots import BAND, series_by_arm
from bnlab.lab.records import Pick, Records, Results, Value, last, learnt_threshold, mean, number, numbers, seeds, where
from bnlab.lab.replay import preserving_state
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.trained_network import Probe, sample_of_train, train
from bnlab.lab.verdict import Evidence
from bnlab.nets.blocks import conv_norm_acts
from bnlab.nets.build import build
from bnlab.nets.network import TableNetwork
from bnlab.recipe import Recipe
from bnlab.report.plots import Plot
from bnlab.training.build import TrainingContext, new_network

WITH_BIAS, WITHOUT_BIAS = "with bias", "without bias"
INCEPTION, SIGMOIDS = "Inception, float32", "sigmoids, float64"
WITHIN, OUTSIDE, SCALED = "mean within the step", "mean outside", "mean and variance outside"
ARMS = (WITHIN, OUTSIDE, SCALED)
ALONE, ALL = "the biases alone", "everything"
_IMAGES = 512  # training photos on which the loss is measured
_ROUNDING, _SAME, _MARGIN, _FIXED, _TIMES = 1e-4, 1e-6, 2.0, 1e-4, 1000.0  # see the rule


def measure(experiment: Experiment) -> Results:
    """Trains networks with and without bias in both precisions, then the paper's example with either gradient."""
    at_end = 100_000  # epochs to a validation, so that there is one, at the end
    same = {**PLAIN_DESCENT, "learning_rate": 1.0, "batch_size": 60, "size": 28, "validate_every": at_end}
    same["steps"] = experiment.by_budget(300, 10_000)
    example = experiment.recipe("mlp", lsuv_init=False, **same)  # it has another kind of normalisation
    inception = experiment.network_pair()[WITH_BN]
    measurements = []
    for pair, network, precision in ((INCEPTION, inception, "float32"), (SIGMOIDS, "bn_mlp", "float64")):
        recipe = experiment.recipe(network, steps=experiment.by_budget(200, 4000), validate_every=at_end)
        how: dict[str, Any] = {"precision": precision, "every": max(1, recipe.steps // 10)}
        measurements += experiment.measurements({pair: recipe}, train_pair, column="pair", **how)
    for learned, arms in ((ALONE, (OUTSIDE, WITHIN)), (ALL, (OUTSIDE, WITHIN, SCALED))):
        for arm in arms:
            how = {"arm": arm, "alone": learned == ALONE, "every": max(1, example.steps // 20)}
            labels = {"learned": learned}
            measurements += experiment.measurements({arm: example}, train_detached, labels=labels, **how)
    return experiment.run(measurements)


def train_pair(job: JobContext, recipe: Recipe, precision: str, every: int) -> Results:
    """Two trainings that differ only in the biases; during the second it is compared with the first."""
    make = partial(make_precise, dtype=getattr(torch, precision))
    if job.device == "mps":  # MPS has no float64
        job = dataclasses.replace(job, device="cpu")
    results: Results = {"twins": [], "biases": []}
    plain = Biases(every, None)
    for arm, probe in ((WITHOUT_BIAS, plain), (WITH_BIAS, Biases(every, plain))):
        folder = job.folder / arm.replace(" ", "-")  # each resumes from its own state
        own = recipe.model_copy(update={"conv_bias": arm == WITH_BIAS})
        trained = train(dataclasses.replace(job, folder=folder), own, probe=probe, make=make)
        results["twins"] += [{"arm": arm, **row} for row in trained.results["accuracy"]]
        results["biases"] += trained.results.get("biases", [])
    return results


def make_precise(recipe: Recipe, classes: int, dtype: torch.dtype) -> TableNetwork:
    """The recipe's network, which computes in this precision whatever the precision of its input."""
    network = new_network(recipe, classes=classes)[0]
    network.register_forward_pre_hook(lambda _, images: images[0].to(dtype))
    return network.to(dtype)


class Biases(Probe):
    """Keeps copies of the weights, or compares them with those of `other`, and measures the gradient of the biases.

    `distance` is the norm of the difference of all parameters but the biases, relative to that of `other`'s.
    `of_weights` and `of_beta` are the norm of the gradient of the biases, relative to that of the same units' weights
    and betas; NaN if those have none. Steps that `other` did not reach because it diverged are left out.
    """

    saved = ("kept",)

    def __init__(self, every: int, other: "Biases | None") -> None:
        super().__init__(every)
        self.other = other
        self.kept: dict[int, dict[str, Tensor]] = {}  # steps done -> parameters
        self.squares: dict[str, float] = {}
        self.hooks = ExitStack()

    def before(self, step: int, context: TrainingContext) -> None:
        self.squares = {"bias": 0.0, "weight": 0.0, "beta": 0.0}
        if self.other is not None and (step + 1) % self.every == 0:
            for unit in conv_norm_acts(context.network):
                parts = {"bias": unit.layer.bias, "weight": unit.layer.weight, "beta": unit.bn.bias}
                for kind, parameter in parts.items():
                    assert isinstance(parameter, Tensor)
                    hook = partial(self._add, kind)  # after the step the gradients no longer exist
                    self.hooks.callback(parameter.register_hook(hook).remove)  # type: ignore[no-untyped-call]

    def after(self, step: int, context: TrainingContext) -> None:
        self.hooks.close()
        done = step + 1
        if done % self.every:
            return
        now = {name: p.detach().cpu().clone() for name, p in context.network.named_parameters()}
        if self.other is None:
            self.kept[done] = now
        elif then := self.other.kept.get(done):
            apart = sum(float((now[name] - old).double().square().sum()) for name, old in then.items())
            length = sum(float(old.double().square().sum()) for old in then.values())
            relative = {"of_weights": self._relative_to("weight"), "of_beta": self._relative_to("beta")}
            self.write("biases", {"step": done, "distance": (apart / length) ** 0.5, **relative})

    def _relative_to(self, kind: str) -> float:
        return (self.squares["bias"] / self.squares[kind]) ** 0.5 if self.squares[kind] else math.nan

    def _add(self, kind: str, gradient: Tensor) -> None:
        self.squares[kind] += float(gradient.detach().double().square().sum())


class DetachedMean(nn.Module):
    """The paper's example: x = u + b for a bias b, and of it x - E[x], with E[x] over the batch and all positions.

    The arm says what the gradient sees: the dependence of E[x] on b and u ("mean within the step"), or a constant
    ("mean outside"). "mean and variance outside" also divides by the standard deviation (biased, with an eps of 1e-5),
    which the gradient takes for a constant too. Training and evaluation are alike. N x C x ... in and out.
    """

    def __init__(self, channels: int, arm: str) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.arm = arm

    def forward(self, u: Tensor) -> Tensor:
        if u.ndim < 2 or u.shape[1] != len(self.bias):
            raise ShapeError(f"DetachedMean takes N x {len(self.bias)} x ..., and got {list(u.shape)}", "reshape it")
        x = u + self.bias.view(-1, *[1] * (u.ndim - 2))  # N x C x ...
        others = [d for d in range(x.ndim) if d != 1]
        mean = x.mean(others, keepdim=True)  # 1 x C x ...
        x = x - (mean if self.arm == WITHIN else mean.detach())  # N x C x ...
        if self.arm == SCALED:
            x = x / (x.detach().square().mean(others, keepdim=True) + 1e-5).sqrt()  # N x C x ...
        return x


def train_detached(job: JobContext, recipe: Recipe, arm: str, *, alone: bool, every: int) -> Results:
    """One training of a network with `DetachedMean` in place of BN: of its biases alone, or of everything."""
    trained = train(job, recipe, probe=Growth(every), make=partial(make_network, arm=arm, alone=alone))
    return {"growth": trained.results["growth"], "trained": trained.results["accuracy"]}


def make_network(recipe: Recipe, classes: int, arm: str, *, alone: bool) -> TableNetwork:
    """A network with `DetachedMean` in place of BN. With `alone`, only its biases are trained."""
    norm = partial(DetachedMean, arm=arm)
    network = build(recipe.network, classes=classes, norm=norm, width=recipe.width, seed=recipe.seed)
    for unit in conv_norm_acts(network):
        unit.layer.requires_grad_(not alone)
    network.fc.requires_grad_(not alone)
    return network


class Growth(Probe):
    """Records the norm of all biases of `DetachedMean` layers, and the loss on the same photos each time."""

    def begin(self, context: TrainingContext) -> None:
        self.images, self.labels = sample_of_train(context, _IMAGES)

    def before(self, step: int, context: TrainingContext) -> None:
        if step == 0:
            self._record(0, context)

    def after(self, step: int, context: TrainingContext) -> None:
        if (step + 1) % self.every == 0:
            self._record(step + 1, context)

    def _record(self, step: int, context: TrainingContext) -> None:
        with preserving_state(context.network), torch.no_grad():
            context.network.eval()  # DetachedMean takes the mean of the batch all the same
            loss = F.cross_entropy(context.network(self.images), self.labels)
        layers = [unit.bn for unit in conv_norm_acts(context.network) if isinstance(unit.bn, DetachedMean)]
        norm = sum(float(layer.bias.detach().double().square().sum()) for layer in layers) ** 0.5
        self.write("growth", {"step": step, "norm": norm, "loss": float(loss)})


def conclude(results: Results) -> Conclusion:
    def of_pair(pair: str, pick: Pick, **arm: Value) -> tuple[float, ...]:
        return _ended(results, "twins" if arm else "biases", "twins", pick, pair=pair, **arm)

    def growth(learned: str, arm: str, pick: Pick) -> tuple[float, ...]:
        return _ended(results, "growth", "trained", pick, learned=learned, arm=arm)

    def times(learned: str) -> list[float]:
        outside, within = (growth(learned, arm, last("norm")) for arm in (OUTSIDE, WITHIN))
        return [a / b if b else math.inf for a, b in zip(outside, within, strict=True)]

    top1s = (of_pair(INCEPTION, _learnt, arm=arm) for arm in (WITH_BIAS, WITHOUT_BIAS))
    gains = [100 * (a - b) for a, b in zip(*top1s, strict=True)]
    trained = where(results["trained"], learned=ALL)
    gradient = "the gradient of biases before BN is rounding compared with that of the weights"
    distance = "biases before BN change the other parameters by no more than rounding (relative; sigmoids, float64)"
    accuracy = f"with biases before BN the test accuracy is the same to {_MARGIN:g} points (Inception, float32)"
    more = "where the gradient ignores the mean, biases that alone are trained grow more than where it does not"
    go_on = "and do not stop: their growth in the second half of the steps, to that in the first"
    fixed = "while the loss stays as it was (its largest relative change)"
    return Conclusion(
        evidence=(
            Evidence(f"{gradient} (Inception, float32)", of_pair(INCEPTION, mean("of_weights")), below=_ROUNDING),
            Evidence(distance, of_pair(SIGMOIDS, last("distance")), below=_SAME),
            points_clause(accuracy, gains, results["twins"], above=-_MARGIN, below=_MARGIN, primary=False),
            ratio_clause(more, times(ALONE), above=_TIMES),
            Evidence(go_on, growth(ALONE, OUTSIDE, _second_half), above=0.5, unit="times"),
            Evidence(fixed, growth(ALONE, OUTSIDE, _change), below=_FIXED),
            ratio_clause("they grow more, too, where everything is trained", times(ALL), above=_TIMES, primary=False),
        ),
        plots={
            "distance": _plot(results, "biases", "Networks with and without biases before BN"),
            "growth": _plot(results, "growth", "Biases before a mean, trained alone", learned=ALONE),
            "growth-everything": _plot(results, "growth", "Biases before a mean, everything trained", learned=ALL),
        },
        numbers={
            "gradient of biases before BN, relative to that of beta": fmean(of_pair(INCEPTION, mean("of_beta"))),
            f"relative distance at the end, {INCEPTION}": fmean(of_pair(INCEPTION, last("distance"))),
            **{
                f"test accuracy, {arm}, everything trained, %": 100 * mean("test_top1")(where(trained, arm=arm))
                for arm in ARMS
            },
        },
        remarks=_remarks(results),
    )


def _ended(results: Results, name: str, trainings: str, pick: Pick, **which: Value) -> tuple[float, ...]:
    """One number for each seed from the table `name`; NaN if one of these trainings diverged or left no rows in it."""
    values = []
    for seed in seeds(results[trainings]):
        rows, ran = (where(results[table], seed=seed, **which) for table in (name, trainings))
        ended = all(row["diverged_at"] is None for row in ran)
        values.append(pick(rows) if rows and ended else math.nan)
    return tuple(values)


def _learnt(rows: Records) -> float:
    top1 = number(rows[-1], "test_top1")
    return top1 if top1 > learnt_threshold(rows[-1]) else math.nan


def _second_half(rows: Records) -> float:
    norms = numbers(rows, "norm")
    middle = norms[len(norms) // 2]
    return (norms[-1] - middle) / middle if middle else math.nan


def _change(rows: Records) -> float:
    losses = numbers(rows, "loss")
    return max(abs(loss / losses[0] - 1) for loss in losses) if losses[0] else math.nan


def _remarks(results: Results) -> tuple[str, ...]:
    whose = [(f"{row['pair']}, {row['arm']}", row) for row in results["twins"]]
    whose += [(f"{row['arm']}, {row['learned']} trained", row) for row in results["trained"]]
    return tuple(f"{who}: seed {row['seed']} diverged" for who, row in whose if row["diverged_at"] is not None)


def _plot(results: Results, table: str, title: str, **which: Value) -> Plot:
    arm, column, y = {
        "biases": ("pair", "distance", "distance of the other parameters, relative"),
        "growth": ("arm", "norm", "norm of all biases"),
    }[table]
    rows = where(results[table], **which)
    caption = f"{plural(len(seeds(rows)), 'seed')}; {BAND}"
    above_0 = [row for row in rows if number(row, column) > 0]  # the first is 0, which has no logarithm
    series = series_by_arm(above_0, "step", column, arm=arm)
    return Plot(title=title, x="steps", y=y, series=series, caption=caption, table=table, log_y=True)


STUDY = Study(
    name="bias",
    title="Biases before normalisation",
    claim="""A bias before BN can be left out, because the mean that BN subtracts removes it; but if the mean were taken
    outside the gradient step, the bias would grow without end while the loss stays the same.""",
    source="Ioffe & Szegedy 2015, sec. 3.2 and 2",
    protocol="""A small Inception (full: GoogLeNet) is trained with biases before BN, which begin at 0, and without,
    from the same weights on the same batches, in float32. In float32 the last bit of a number decides which of two
    equal values a max pooling passes on, and on which side of 0 a ReLU is. So two such trainings drift apart by chance,
    and only their accuracies compare, as a secondary clause. The paper's sigmoid network has no such edges; it is
    trained both ways in float64, where any effect of the biases stays visible. The paper's example, x = u + b and x -
    E[x], then takes the place of BN in three layers of 100 sigmoids: with a gradient that ignores E[x], and with one
    that follows it. Here E[x] is over the batch (in evaluation too), and not over all of train as in the paper. First
    only the biases are trained, as in the example; then everything, also with a standard deviation that the gradient
    ignores. Training is gradient descent at a constant rate of 1.0, with 60 photos to a batch. The loss is that on the
    same 512 training photos. A seed of which a training diverged shows nothing in the clauses that need this training;
    accuracies no better than guessing are not compared.""",
    rule="""There are five clauses. The norm of the biases' gradient is below 1e-4 of the weights'. In float64 the other
    parameters end at a relative distance below 1e-6. With the mean outside, if only the biases are trained, their norm
    ends above 1000 times that with the mean within; it grows in the second half of the steps by more than half of what
    it grew in the first; and the loss changes by less than 1e-4 of its value. Each is decided by its 95% interval over
    seeds.""",
    measure=measure,
    conclude=conclude,
)
