"""Paper 3.3: BN ignores the scale of the weights before it, layer by layer, and what follows for a training."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bnlab.data.preprocess import normalise
from bnlab.errors import plural
from bnlab.lab.clauses import ratio_clause
from bnlab.lab.experiment import PLAIN_DESCENT, WITH_BN, WITHOUT_BN, Experiment
from bnlab.lab.measurements import JobContext
from bnlab.lab.plots import series_by_arm, series_over_seeds
from bnlab.lab.records import Pick, Records, Results, Row, by_seed, geometric_mean, mean, numbers, seeds, where
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.trained_network import Probe, train
from bnlab.lab.verdict import Evidence
from bnlab.nets.blocks import conv_norm_acts
from bnlab.recipe import Recipe
from bnlab.report.plots import Plot
from bnlab.streams import Use, random_stream
from bnlab.training.build import TrainingContext

FACTORS = (1e-3, 1e-2, 0.1, 0.3, 3.0, 10.0, 1e2, 1e3)
EXACT, USUAL = "float64, eps negligible", "float32, the usual eps"
RATES = {WITH_BN: 1.0, WITHOUT_BN: 0.01}  # without BN the training diverges at 0.1
KINDS = {"output": "output", "input_gradient": "gradient of the input", "weight_gradient": "gradient of the weights"}
_NO_EPS = 1e-30
_DEAD = 1e-12  # below this variance a channel counts as constant: no eps is negligible next to it
_TOLERANCE, _ORTHOGONAL = 1e-9, 1e-3


def measure(experiment: Experiment) -> Results:
    """Trains both networks by plain gradient descent, then scales the weights of each layer that has BN."""
    same = {**PLAIN_DESCENT, "steps": experiment.by_budget(200, 5000), "validate_every": 100_000}
    networks = experiment.network_pair()
    arms = {arm: experiment.recipe(networks[arm], learning_rate=rate, **same) for arm, rate in RATES.items()}
    every = max(1, arms[WITH_BN].steps // 20)
    return experiment.run(experiment.measurements(arms, train_and_scale, every=every))


def train_and_scale(job: JobContext, recipe: Recipe, every: int) -> Results:
    """One training with the norms of its weights, and what scaling the weights changes in the trained network."""
    trained = train(job, recipe, probe=Norms(every))
    pixels, _ = next(trained.context.loader.epoch(0, recipe.size))
    images = normalise(torch.from_numpy(pixels), trained.context.preprocessing)  # N x 3 x H x W
    rows: Records = []
    for name, layer, bn, u in normalised_layers(trained.context.network, images):
        rows += scaled(name, layer, bn, u, torch.float64, _NO_EPS, kind=EXACT, seed=job.seed)
        rows += scaled(name, layer, bn, u, torch.float32, recipe.norm_eps, kind=USUAL, seed=job.seed)
    return {"training": trained.results["training"], "scaled": rows}


def normalised_layers(network: nn.Module, images: Tensor) -> Iterator[tuple[str, nn.Module, nn.Module, Tensor]]:
    """The units with BN of a copy on the CPU: name, layer, BN, and the input that the layer has for these images."""
    network = copy.deepcopy(network).cpu().train()
    names = {module: name for name, module in network.named_modules()}
    inputs: dict[nn.Module, Tensor] = {}

    def keep(unit: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs[unit] = given[0].clone()  # a later layer may work in place

    units = [unit for unit in conv_norm_acts(network) if not isinstance(unit.bn, nn.Identity)]
    with ExitStack() as hooks, torch.no_grad(), torch.random.fork_rng(devices=[]):
        for unit in units:
            hooks.enter_context(unit.register_forward_pre_hook(keep))
        network(images)
    for unit in units:
        yield names[unit], unit.layer, unit.bn, inputs[unit]


def scaled(
    name: str, layer: nn.Module, bn: Any, u: Tensor, dtype: torch.dtype, eps: float, *, kind: str, seed: int
) -> Iterator[Row]:
    """The relative changes of BN(Wu) and of its gradients when the weights become aW, for each factor a.

    The gradients are those of a random weighting of the outputs; that of the weights is multiplied by a before it is
    compared. `predicted` is the change of the output that follows from eps: a channel of variance v becomes
    sqrt((v + eps) / (v + eps / a^2)) times as large. Channels of no variance are left out; `dead` is their fraction.
    """
    layer, bn, u = copy.deepcopy(layer).to(dtype), copy.deepcopy(bn).to(dtype), u.to(dtype)
    bn.eps = eps
    weight, original = weight_of(layer), weight_of(layer).detach().clone()
    with torch.no_grad():
        x = layer(u)  # N x C x ...
    var = _by_channel(x.double()).var(1, unbiased=False)  # C
    alive = var > _DEAD
    random = torch.from_numpy(random_stream(seed, Use.GRADIENT_WEIGHTS).standard_normal(x.shape))  # N x C x ...
    weighting = random.to(dtype) * alive.to(dtype).view(-1, *[1] * (x.ndim - 2))  # N x C x ...

    def at(a: float) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            weight.copy_(original * a)
        given = u.detach().clone().requires_grad_()
        y = bn(layer(given))  # N x C x ...
        of_input, of_weight = torch.autograd.grad(y, (given, weight), weighting)
        return _by_channel(y.detach().double())[alive], of_input.double(), a * of_weight.double()

    plain = at(1.0)
    power = plain[0].var(1, unbiased=False) * plain[0].shape[1]  # sum of squares of each channel's output less its mean
    for a in FACTORS:
        off = [float((new - old).norm() / old.norm()) for new, old in zip(at(a), plain, strict=True)]
        change = ((var + eps) / (var + eps / a**2)).sqrt()[alive] - 1
        yield {
            "kind": kind,
            "layer": name,
            "factor": a,
            **dict(zip(KINDS, off, strict=True)),
            "predicted": float((change.square() * power).sum().sqrt() / plain[0].norm()),
            "dead": float((~alive).double().mean()),
        }


def weight_of(layer: nn.Module) -> nn.Parameter:
    """The weights directly before BN, which in a separable convolution are those of its second half."""
    return [parameter for parameter in layer.parameters() if parameter.ndim > 1][-1]


def _by_channel(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1)  # C x m


class Norms(Probe):
    """Records the norm of each unit's weights W, and the cosine of the angle between W and dL/dW.

    `predicted_norm` is the norm that follows if that angle is a right one: then gradient descent without momentum adds
    |rate * dL/dW|^2 to |W|^2 in each step. The norm is that after the step, the cosine is that in the step.
    """

    saved = ("squares",)

    def __init__(self, every: int) -> None:
        super().__init__(every)
        self.squares: dict[str, list[float]] = {}  # layer -> |W|^2 at the start, and as predicted now
        self.gradients: dict[str, tuple[float, float]] = {}  # layer -> |rate * dL/dW|^2 and cosine of this step
        self.hooks = ExitStack()

    def before(self, step: int, context: TrainingContext) -> None:
        rate = context.optimizer.param_groups[0]["lr"]
        for name, weight in _weights(context):
            if step == 0:
                self._write(0, name, weight, None)
            keep = partial(self._keep, name, weight, rate)  # after the step the gradients no longer exist
            self.hooks.callback(weight.register_hook(keep).remove)  # type: ignore[no-untyped-call]

    def after(self, step: int, context: TrainingContext) -> None:
        self.hooks.close()
        for name, weight in _weights(context):
            grown, cosine = self.gradients[name]
            self.squares[name][1] += grown
            if (step + 1) % self.every == 0:
                self._write(step + 1, name, weight, abs(cosine))

    def _keep(self, name: str, weight: Tensor, rate: float, gradient: Tensor) -> None:
        w, g = weight.detach().double().flatten(), gradient.detach().double().flatten()
        square = float(g.dot(g))
        cosine = float(w.dot(g)) / math.sqrt(square * float(w.dot(w))) if square else 0.0
        self.gradients[name] = (rate**2 * square, cosine)

    def _write(self, step: int, name: str, weight: Tensor, cosine: float | None) -> None:
        square = float(weight.detach().double().square().sum())
        first, predicted = self.squares.setdefault(name, [square, square])
        norms = {"relative_norm": math.sqrt(square / first), "predicted_norm": math.sqrt(predicted / first)}
        self.write("training", {"step": step, "layer": name, **norms, "cosine": cosine})


def _weights(context: TrainingContext) -> Iterator[tuple[str, nn.Parameter]]:
    names = {module: name for name, module in context.network.named_modules()}
    for unit in conv_norm_acts(context.network):
        yield names[unit], weight_of(unit.layer)


def conclude(results: Results) -> Conclusion:
    exact, usual = (where(results["scaled"], kind=kind) for kind in (EXACT, USUAL))
    smallest = where(usual, factor=min(FACTORS))
    training = results["training"]
    angles = [row for row in training if row["cosine"] is not None]
    ends = where(training, step=max(numbers(training, "step")))
    without = where(ends, arm=WITHOUT_BN)  # empty if all of them diverged
    growth = geometric_mean("relative_norm")
    cosines, norms = by_seed(angles, mean("cosine"), arm=WITH_BN), by_seed(ends, growth, arm=WITH_BN)
    norms_predicted = by_seed(ends, geometric_mean("relative_norm", "predicted_norm"), arm=WITH_BN)
    eps_predicted = by_seed(smallest, geometric_mean("output", "predicted"))
    at_a = f"at a = {min(FACTORS):g} and the usual eps, the output changes by what eps / (a^2 var) predicts"
    right = "in training with BN, weights and their gradient are at right angles (the mean |cosine|)"
    rounding = "with eps negligible, a changes the {} by no more than rounding (the largest change)"
    as_predicted = partial(ratio_clause, above=0.98, below=1.02, primary=False)
    return Conclusion(
        evidence=(
            *(
                Evidence(rounding.format(kind), by_seed(exact, _largest(column)), below=_TOLERANCE, ratio=True)
                for column, kind in KINDS.items()
            ),
            Evidence(right, cosines, below=_ORTHOGONAL, ratio=True),
            ratio_clause("in training with BN, the norm of a layer's weights grows", norms, above=1.0),
            as_predicted("the norm at the end is what right angles predict", norms_predicted),
            as_predicted(at_a, eps_predicted),
        ),
        plots={
            "exact": _changes(exact, EXACT, KINDS),
            "eps": _changes(usual, USUAL, KINDS | {"predicted": "output, as eps predicts it"}),
            "norms": _over_steps(training, "relative_norm", "Norm of a layer's weights", "norm / norm at first"),
            "angles": _over_steps(angles, "cosine", "Angle between weights and gradient", "|cosine|", log_y=True),
        },
        numbers={
            "rate / norm^2 at the end, of that at first, with BN": growth(where(ends, arm=WITH_BN)) ** -2,
            "norm at the end, of that at first, without BN": growth(without) if without else None,
            "mean |cosine|, without BN": mean("cosine")(where(angles, arm=WITHOUT_BN)) if without else None,
            "share of channels left out, for nothing reaches them": mean("dead")(exact),
        },
    )


def _largest(column: str) -> Pick:
    return lambda rows: max(numbers(rows, column))


def _changes(rows: Records, kind: str, columns: Mapping[str, str]) -> Plot:
    series = tuple(series_over_seeds(name, rows, "factor", column) for column, name in columns.items())
    title, y = f"A layer's weights times a: {kind}", "change, relative to a = 1"
    return _plot(rows, title, x="a", y=y, series=series, table="scaled", log_x=True, log_y=True)


def _over_steps(rows: Records, column: str, title: str, y: str, *, log_y: bool = False) -> Plot:
    series = series_by_arm(rows, "step", column)
    return _plot(rows, title, x="steps", y=y, series=series, table="training", log_y=log_y)


def _plot(rows: Records, title: str, **about: Any) -> Plot:
    marks = "line: mean over layers and seeds, band: lowest to highest of them"
    return Plot(title=title, caption=f"{plural(len(seeds(rows)), 'seed')}; {marks}", **about)


STUDY = Study(
    name="scale-invariance",
    title="The scale of the weights",
    claim="""BN((aW)u) = BN(Wu): the scale a of a layer's weights changes neither its output nor its Jacobian, and
    the gradient of the weights is 1/a times as large, so that larger weights lead to smaller gradients.""",
    source="Ioffe & Szegedy 2015, sec. 3.3",
    protocol="""A small Inception (full: GoogLeNet) is trained with BN and without, by plain gradient descent at a
    constant rate of 1.0 and 0.01, without momentum or weight decay; at 0.1 the network without BN diverges. Then the
    weights of each layer with BN are multiplied by a, from 0.001 to 1000, on a training batch as the trained network
    meets it. The study compares the output of BN, and the gradients of a random weighting of it in the layer's input
    and weights, with those at a = 1: once in float64 with an eps of 1e-30, because the equations are exact for an eps
    of 0, and once as trained, where eps shows at small a. During the training it records the norm of each layer's W and
    |cosine| between W and dL/dW. The claim implies that the two are at right angles; so steps lengthen W, and the
    effective learning rate, rate / |W|^2, falls.""",
    rule="""There are five clauses. With eps negligible, the largest change over layers and a is below 1e-9 for the
    output, for the gradient of the input, and for a times the gradient of the weights. In training the mean |cosine| is
    below 0.001, and the norm of the weights grows (its geometric mean over layers is above 1). Each is decided by its
    95% interval over seeds.""",
    measure=measure,
    conclude=conclude,
)
