"""Paper 3.3: BN ignores the scale of the weights before it, layer by layer; and what follows for a training."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bnlab.data.preprocess import normalise
from bnlab.errors import plural
from bnlab.lab.experiment import WITH_BN, WITHOUT_BN, Experiment
from bnlab.lab.measurements import JobContext
from bnlab.lab.plots import series_by_arm, series_over_seeds
from bnlab.lab.records import Records, Results, Row, by_seed, mean, number, numbers, seeds, where
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.trained_network import Probe, train
from bnlab.lab.verdict import Evidence
from bnlab.nets.blocks import conv_norm_acts
from bnlab.recipe import Recipe
from bnlab.report.plots import Plot
from bnlab.training.build import TrainingContext

FACTORS = (1e-3, 1e-2, 0.1, 0.3, 3.0, 10.0, 1e2, 1e3)
EXACT, USUAL = "float64, eps negligible", "float32, the usual eps"
RATES = {WITH_BN: 1.0, WITHOUT_BN: 0.01}  # without BN it diverges at a tenth of the other
KINDS = {"output": "output", "input_gradient": "gradient of the input", "weight_gradient": "gradient of the weights"}
_NO_EPS = 1e-30
_DEAD = 1e-12  # variance of a channel that nothing reaches: no eps is negligible beside it
_TOLERANCE, _ORTHOGONAL = 1e-9, 1e-3


def measure(experiment: Experiment) -> Results:
    """Twins trained by plain gradient descent; each layer of the one with BN is then tried at other scales."""
    same: dict[str, Any] = {"steps": experiment.by_budget(200, 5000), "schedule": "constant", "validate_every": 100_000}
    same |= {"momentum": 0.0, "weight_decay": 0.0}
    networks = experiment.network_pair()
    arms = {arm: experiment.recipe(networks[arm], learning_rate=rate, **same) for arm, rate in RATES.items()}
    every = max(1, arms[WITH_BN].steps // 20)
    return experiment.run(experiment.measurements(arms, train_and_scale, every=every))


def train_and_scale(job: JobContext, recipe: Recipe, every: int) -> Results:
    """One training with its weights' norms, and what scaling the weights does to the network that comes of it."""
    trained = train(job, recipe, probe=Norms(every))
    pixels, _ = next(trained.context.loader.epoch(0, recipe.size))
    images = normalise(torch.from_numpy(pixels), trained.context.preprocessing)  # N x 3 x H x W
    rows: Records = []
    for name, layer, bn, u in normalised_layers(trained.context.network, images):
        rows += scaled(name, layer, bn, u, torch.float64, _NO_EPS, kind=EXACT, seed=job.seed)
        rows += scaled(name, layer, bn, u, torch.float32, recipe.norm_eps, kind=USUAL, seed=job.seed)
    return {"training": trained.results["training"], "scaled": rows}


def normalised_layers(network: nn.Module, images: Tensor) -> Iterator[tuple[str, nn.Module, nn.Module, Tensor]]:
    """Of each unit with BN: name, layer, BN and the layer's input on these images; of a copy, on the CPU."""
    network = copy.deepcopy(network).cpu().train()
    names = {module: name for name, module in network.named_modules()}
    inputs: dict[nn.Module, Tensor] = {}

    def keep(unit: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs[unit] = given[0].clone()  # whatever is done in place later

    units = [unit for unit in conv_norm_acts(network) if not isinstance(unit.bn, nn.Identity)]
    hooks = [unit.register_forward_pre_hook(keep) for unit in units]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        network(images)
    for hook in hooks:
        hook.remove()
    for unit in units:
        yield names[unit], unit.layer, unit.bn, inputs[unit]


def scaled(
    name: str, layer: nn.Module, bn: Any, u: Tensor, dtype: torch.dtype, eps: float, *, kind: str, seed: int
) -> Iterator[Row]:
    """How far BN(aWu) and its gradients lie from those of BN(Wu), for each factor a, relative to these.

    Gradients are those of a random weighting of the outputs. Of the weights' gradient it is `a` times it that is
    compared. `predicted` is what eps does to the output: of a channel of variance v it makes sqrt((v + eps) /
    (v + eps / a^2)) times what it was. Channels that nothing reaches have no variance, and are left out.
    """
    layer, bn, u = copy.deepcopy(layer).to(dtype), copy.deepcopy(bn).to(dtype), u.to(dtype)
    bn.eps = eps
    weight, original = weight_of(layer), weight_of(layer).detach().clone()
    with torch.no_grad():
        x = layer(u)  # N x C x ...
    var = _by_channel(x.double()).var(1, unbiased=False)  # C
    alive = var > _DEAD
    random = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weighting = random.to(dtype) * alive.to(dtype).view(-1, *[1] * (x.ndim - 2))  # N x C x ...

    def at(a: float) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            weight.copy_(original * a)
        given = u.detach().clone().requires_grad_()
        y = bn(layer(given))  # N x C x ...
        of_input, of_weight = torch.autograd.grad(y, (given, weight), weighting)
        return _by_channel(y.detach().double())[alive], of_input.double(), a * of_weight.double()

    plain = at(1.0)
    power = plain[0].var(1, unbiased=False) * plain[0].shape[1]  # of each channel's output without its mean
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
    """The weights right before BN: of a separable convolution its second half's."""
    return [parameter for parameter in layer.parameters() if parameter.ndim > 1][-1]


def _by_channel(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1)  # C x m


class Norms(Probe):
    """Of each unit's weights W, every so many steps: their norm, and the cosine of the angle between W and dL/dW.

    `predicted` is the norm that follows where that angle is a right one: |W|^2 grows by |rate * dL/dW|^2 a step, for
    gradient descent without momentum. The norm is that after the step, the cosine that in the step.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self.squares: dict[str, list[float]] = {}  # layer -> |W|^2 at first, as predicted
        self.gradients: dict[str, tuple[float, float]] = {}  # layer -> |rate * dL/dW|^2, cosine; of this step
        self.hooks: list[Any] = []

    def before(self, step: int, context: TrainingContext) -> None:
        """Listen for the gradients: after the step they are gone."""
        rate = context.optimizer.param_groups[0]["lr"]
        for name, weight in _weights(context):
            if step == 0:
                square = float(weight.detach().double().square().sum())
                self.squares[name] = [square, square]
                self._write(0, name, square, None)
            self.hooks.append(weight.register_hook(self._listener(name, weight, rate)))  # type: ignore[no-untyped-call]

    def after(self, step: int, context: TrainingContext) -> None:
        """Add up, and write down where it is time."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        for name, weight in _weights(context):
            grown, cosine = self.gradients[name]
            self.squares[name][1] += grown
            if (step + 1) % self.every == 0:
                self._write(step + 1, name, float(weight.detach().double().square().sum()), cosine)

    def state_dict(self) -> dict[str, Any]:
        """With the sums."""
        return super().state_dict() | {"squares": self.squares}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Stand where it stood."""
        super().load_state_dict(state)
        self.squares = state["squares"]

    def _listener(self, name: str, weight: Tensor, rate: float) -> Callable[[Tensor], None]:
        def listen(gradient: Tensor) -> None:
            w, g = weight.detach().double().flatten(), gradient.detach().double().flatten()
            square = float(g.dot(g))
            cosine = float(w.dot(g)) / math.sqrt(square * float(w.dot(w))) if square else 0.0
            self.gradients[name] = (rate**2 * square, cosine)

        return listen

    def _write(self, step: int, name: str, square: float, cosine: float | None) -> None:
        first, predicted = self.squares[name]
        row: Row = {"step": step, "layer": name, "relative_norm": math.sqrt(square / first)}
        row |= {"predicted_norm": math.sqrt(predicted / first), "cosine": None if cosine is None else abs(cosine)}
        self.write("training", row)


def _weights(context: TrainingContext) -> Iterator[tuple[str, nn.Parameter]]:
    names = {module: name for name, module in context.network.named_modules()}
    for unit in conv_norm_acts(context.network):
        yield names[unit], weight_of(unit.layer)


def conclude(results: Results) -> Conclusion:
    """The largest deviations, the angles and the growth of the norms."""
    exact, usual = (where(results["scaled"], kind=kind) for kind in (EXACT, USUAL))
    smallest = where(usual, factor=min(FACTORS))
    training = results["training"]
    angles = [row for row in training if row["cosine"] is not None]
    ends = where(training, step=max(numbers(training, "step")))
    with_bn = _geometric("relative_norm")(where(ends, arm=WITH_BN))
    without = where(ends, arm=WITHOUT_BN)  # none, where all of them diverged
    times: dict[str, Any] = {"unit": "times", "ratio": True}
    beside = times | {"above": 0.98, "below": 1.02, "primary": False}
    exactly = [
        Evidence(
            what=f"with eps negligible, a changes the {kind} by no more than rounding (the largest change)",
            values=tuple(by_seed(exact, _largest(column))),
            below=_TOLERANCE,
            ratio=True,
        )
        for column, kind in KINDS.items()
    ]
    orthogonal = Evidence(
        what="in training with BN, weights and their gradient are at right angles (the mean |cosine|)",
        values=tuple(by_seed(angles, mean("cosine"), arm=WITH_BN)),
        below=_ORTHOGONAL,
        ratio=True,
    )
    grows = Evidence(
        what="in training with BN, the norm of a layer's weights grows",
        values=tuple(by_seed(ends, _geometric("relative_norm"), arm=WITH_BN)),
        above=1.0,
        **times,
    )
    foretold = Evidence(
        what="the norm at the end is what right angles predict",
        values=tuple(by_seed(ends, _geometric("relative_norm", "predicted_norm"), arm=WITH_BN)),
        **beside,
    )
    by_eps = Evidence(
        what=f"at a = {min(FACTORS):g} and the usual eps, the output changes by what eps / (a^2 var) predicts",
        values=tuple(by_seed(smallest, _geometric("output", "predicted"))),
        **beside,
    )
    return Conclusion(
        evidence=(*exactly, orthogonal, grows, foretold, by_eps),
        plots={
            "exact": _changes(exact, f"A layer's weights times a: {EXACT}"),
            "eps": _changes(usual, f"A layer's weights times a: {USUAL}", predicted="output, as eps predicts it"),
            "norms": _over_steps(training, "relative_norm", "Norm of a layer's weights", "norm / norm at first"),
            "angles": _over_steps(angles, "cosine", "Angle between weights and gradient", "|cosine|", log_y=True),
        },
        numbers={
            "rate / norm^2 at the end, of that at first, with BN": with_bn**-2,
            "norm at the end, of that at first, without BN": _geometric("relative_norm")(without) if without else None,
            "mean |cosine|, without BN": mean("cosine")(where(angles, arm=WITHOUT_BN)) if without else None,
            "share of channels left out, for nothing reaches them": mean("dead")(exact),
        },
    )


def _largest(column: str) -> Callable[[Records], float]:
    return lambda rows: max(numbers(rows, column))


def _geometric(column: str, over: str | None = None) -> Callable[[Records], float]:
    """Picks the geometric mean of a column, or of one in terms of another."""

    def pick(rows: Records) -> float:
        values = [number(row, column) / (number(row, over) if over else 1.0) for row in rows]
        return math.exp(sum(map(math.log, values)) / len(values))

    return pick


def _changes(rows: Records, title: str, predicted: str = "") -> Plot:
    shown = KINDS | ({"predicted": predicted} if predicted else {})
    series = tuple(series_over_seeds(name, rows, "factor", column) for column, name in shown.items())
    caption, y = _caption(rows), "change, relative to a = 1"
    return Plot(title=title, x="a", y=y, series=series, caption=caption, table="scaled", log_x=True, log_y=True)


def _over_steps(rows: Records, column: str, title: str, y: str, *, log_y: bool = False) -> Plot:
    series, caption = series_by_arm(rows, "step", column), _caption(rows)
    return Plot(title=title, x="steps", y=y, series=series, caption=caption, table="training", log_y=log_y)


def _caption(rows: Records) -> str:
    return f"{plural(len(seeds(rows)), 'seed')}; line: mean over layers and seeds, band: lowest to highest of them"


STUDY = Study(
    name="scale-invariance",
    title="The scale of the weights",
    claim="""BN((aW)u) = BN(Wu): the scale a of a layer's weights changes neither its output nor its Jacobian, and
    the gradient of the weights is 1/a times as large, so that larger weights lead to smaller gradients.""",
    source="Ioffe & Szegedy 2015, sec. 3.3",
    protocol="""A small Inception with BN (full: GoogLeNet) and its twin without are trained by plain gradient
    descent at a constant 1.0 and 0.01 (at 0.1 the twin diverges), without momentum or weight decay. Then the
    weights of each layer with BN are multiplied by a from 0.001 to 1000, on a training batch as the trained network
    sees it: what BN gives, and the gradients of a random weighting of that in the layer's input and weights,
    relative to those at a = 1; once in float64 with an eps of 1e-30 (the equations are exact for 0), once as
    trained, where eps shows at small a. On the way each layer's |cosine| between W and dL/dW, and the norm of W: it
    follows from the claim that the two are at right angles, and so that steps lengthen W and the effective learning
    rate, rate / |W|^2, falls.""",
    rule="""Five clauses: with eps negligible the largest change over layers and a of the output, of the gradient of
    the input and of a times that of the weights is below 1e-9; in training the mean |cosine| is below 0.001, and
    the norm of the weights grows (geometric mean over layers above 1). Each by its 95% interval over seeds.""",
    measure=measure,
    conclude=conclude,
)
