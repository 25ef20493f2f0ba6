"""Santurkar et al. 2018: is it less internal covariate shift that makes batch normalisation help?"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bnlab.errors import plural
from bnlab.lab.experiment import WITH_BN, WITHOUT_BN, Experiment
from bnlab.lab.lr_selection import LearntFilter, chosen, lr_remarks, mark_chosen
from bnlab.lab.measurements import JobContext
from bnlab.lab.plots import BAND, caption, series_by_arm
from bnlab.lab.records import (
    Records,
    Results,
    Row,
    by_seed,
    distinct,
    gained,
    last,
    mean,
    numbers,
    ratios,
    resolution,
    seeds,
    where,
)
from bnlab.lab.replay import batch_at, is_probe_step, loss_and_gradients, replaying, set_parameters
from bnlab.lab.studies.covariate_shift.noisy_batch_norm import SCALE, SHIFT, NoisyBatchNorm, other_noise
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.trained_network import Probe, train, with_norm
from bnlab.lab.verdict import Evidence
from bnlab.nets.blocks import conv_norm_acts
from bnlab.nets.network import TableNetwork
from bnlab.recipe import Recipe
from bnlab.report.plots import Plot
from bnlab.training.build import TrainingContext

NOISY = "with noisy BN"
ARMS = (WITHOUT_BN, WITH_BN, NOISY)
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
_TRIED = ", ".join(f"{rate:g}" for rate in RATES)
EQUAL = 0.01  # the rate at which arms are compared too
_LAYERS = 3  # looked at in each network
_LOOKS = 10  # in each training
_HELPED = 2.0  # points of accuracy: from here on a network counts as helped


def measure(experiment: Experiment) -> Results:
    """Three networks at each rate; the shift on the way."""
    networks = experiment.network_pair()
    same: dict[str, Any] = {
        "steps": experiment.by_budget(150, 10_000),
        "dropout": 0.0,
        "validate_every": experiment.by_budget(2, 0),
    }
    if experiment.budget == "quick" and experiment.splits.kind == "digits":
        same["size"] = 16
    measurements = []
    for arm in ARMS:
        recipe = experiment.recipe(networks.get(arm, networks[WITH_BN]), **same)
        measurements += [
            experiment.measurement(
                shifted,
                seed,
                labels={"arm": arm, "learning_rate": rate},
                recipe=recipe.model_copy(update={"learning_rate": rate}),
                noisy=arm == NOISY,
            )
            for rate in RATES
            for seed in experiment.seeds
        ]
    return mark_chosen(experiment.run(measurements))


def shifted(job: JobContext, recipe: Recipe, noisy: bool) -> Results:
    """One training, with the shift of some layers on the way."""

    def layer(channels: int) -> nn.Module:
        return NoisyBatchNorm(channels, eps=recipe.norm_eps, momentum=recipe.norm_momentum)

    probe = Shift(probe_steps=_LOOKS, layers=_LAYERS)
    train(job, recipe, probe=probe, make=with_norm(layer) if noisy else None)
    return {"accuracy": probe.results["accuracy"], "shift": probe.results.get("shift", [])}


class Shift(Probe):
    """How far the updates of the layers before it turn a layer's gradient (Santurkar et al. 2018, Def. 2.1).

    G is the gradient of the step's loss with respect to a layer's weights before the step; G' the same, on the same
    batch, with the parameters of all rows before the layer's as the step left them, and with noise drawn anew there, if
    there is any. A layer stands for its row of the network's table: the row's first.
    """

    def __init__(self, probe_steps: int, layers: int) -> None:
        super().__init__()
        self.probe_steps, self.layers = probe_steps, layers
        self.before_it: dict[str, Tensor] = {}

    def before(self, step: int, context: TrainingContext) -> None:
        """Keep the weights, where it is time."""
        self.before_it = {}
        if is_probe_step(step, context, self.probe_steps):
            self.before_it = {name: p.detach().clone() for name, p in context.network.named_parameters()}

    def after(self, step: int, context: TrainingContext) -> None:
        """Compare, where the weights were kept."""
        if not self.before_it:
            return
        network = context.network
        parameters = dict(network.named_parameters())
        updated = {name: p.detach().clone() for name, p in parameters.items()}
        batch, chosen_layers = batch_at(step, context), shifted_layers(network, self.layers)
        with replaying(context):
            set_parameters(parameters, self.before_it)
            weights = [weight for _, weight, _ in chosen_layers]
            _, old = loss_and_gradients(context, batch, weights, step)
            for (name, weight, earlier), gradient in zip(chosen_layers, old, strict=True):
                set_parameters(parameters, {key: updated[key] for key in parameters if key.split(".")[0] in earlier})
                with other_noise(network, earlier):
                    _, (new,) = loss_and_gradients(context, batch, [weight], step)
                set_parameters(parameters, self.before_it)
                if gradient.isfinite().all() and new.isfinite().all():
                    row: Row = {"step": step, "layer": name}
                    self.write("shift", row | compared(gradient, new))
        self.before_it = {}


def shifted_layers(network: TableNetwork, most: int) -> list[tuple[str, nn.Parameter, set[str]]]:
    """Up to so many rows' first layers, evenly spread, the last among them: row, weights, rows before it."""
    rows = [name for name in network.order if conv_norm_acts(network.get_submodule(name))]
    count = min(most, len(rows) - 1)
    places = [round((i + 1) * (len(rows) - 1) / count) for i in range(count)]
    found = []
    for job in places:
        layer = conv_norm_acts(network.get_submodule(rows[job]))[0].layer
        weight = next(p for p in layer.parameters() if p.ndim > 1)
        found.append((rows[job], weight, set(rows[:job])))
    return found


def compared(old: Tensor, new: Tensor) -> Row:
    """||G||, ||G - G'||, their ratio and cos(G, G')."""
    a, b = old.double().flatten(), new.double().flatten()
    length, distance = float(a.norm()), float((a - b).norm())
    cosine = float(a @ b) / max(length * float(b.norm()), 1e-300)
    return {"gradient": length, "distance": distance, "relative": distance / max(length, 1e-300), "cosine": cosine}


def conclude(results: Results) -> Conclusion:
    """The shift of three networks, and how well they train."""
    accuracies, shifts = chosen(results), chosen(results, "shift")
    equal = where(results["shift"], learning_rate=EQUAL)
    learnt, learnt_so = LearntFilter(accuracies), LearntFilter(where(results["accuracy"], learning_rate=EQUAL))
    points: dict[str, Any] = {"unit": "points", "resolution": resolution(accuracies)}

    def better(first: str, second: str) -> tuple[float, ...]:
        return learnt.only(gained(accuracies, first, second, last("test_top1")), second)

    def steadier(what: str, rows: Records, learnt: LearntFilter, *, primary: bool = False) -> Evidence:
        ours, theirs = (by_seed(rows, mean("cosine"), arm=arm) for arm in (WITH_BN, WITHOUT_BN))
        values = [a - b for a, b in zip(ours, theirs, strict=True)]
        return Evidence(what=what, values=learnt.only(values, WITH_BN, WITHOUT_BN), above=0.0, primary=primary)

    def moved(what: str, rows: Records, learnt: LearntFilter, first: str, second: str, **claimed: Any) -> Evidence:
        values = learnt.only(ratios(rows, first, second, _typical("relative")), first, second)
        return Evidence(what=what, values=values, unit="times", ratio=True, **claimed)

    turned, share = "a layer's gradient keeps its direction better", "a layer's gradient moves less, relative to it"
    beside: dict[str, Any] = {"above": 1.0, "primary": False}
    back = moved("with noisy BN it moves more than without BN", shifts, learnt, NOISY, WITHOUT_BN, **beside)
    # Where there is no help, or as little shift as with BN, it proves nothing how well noisy BN trains.
    helps = better(WITH_BN, WITHOUT_BN)
    asked = [times > 1 and help >= _HELPED for times, help in zip(back.values, helps, strict=True)]
    helped = [gain if ask else math.nan for gain, ask in zip(better(NOISY, WITHOUT_BN), asked, strict=True)]
    same = f", both at a learning rate of {EQUAL:g}"
    return Conclusion(
        evidence=(
            steadier(f"with BN {turned}: difference of the cosines", shifts, learnt, primary=True),
            moved(f"with BN {share}", shifts, learnt, WITH_BN, WITHOUT_BN, below=1.0),
            Evidence(
                what="noisy BN, with more shift than without BN, does not help: its test accuracy less that without",
                values=tuple(helped),
                below=_HELPED,
                **points,
            ),
            back,
            moved("with noisy BN it moves more than with BN", shifts, learnt, NOISY, WITH_BN, **beside),
            *(
                Evidence(
                    what=f"{first} the test accuracy is higher than {second}",
                    values=better(first, second),
                    above=0.0,
                    primary=False,
                    **points,
                )
                for first, second in ((NOISY, WITHOUT_BN), (WITH_BN, NOISY), (WITH_BN, WITHOUT_BN))
            ),
            steadier(f"with BN {turned}{same}", equal, learnt_so),
            moved(f"with BN {share}{same}", equal, learnt_so, WITH_BN, WITHOUT_BN, below=1.0, primary=False),
        ),
        plots={
            "accuracy": _accuracy(accuracies),
            "cosine": _plot(shifts, "cosine", "Direction of a layer's gradient, before and after the others' update"),
            "distance": _plot(shifts, "relative", "Move of a layer's gradient under the others' update"),
        },
        numbers={f"learning rate {arm}, mean": mean("learning_rate")(where(accuracies, arm=arm)) for arm in ARMS},
        remarks=(
            *(
                []
                if all(asked)
                else ["in some seeds BN does not help, or noisy BN has no more shift than none: they tell nothing"]
            ),
            *learnt.remarks,
            *lr_remarks(results),
        ),
    )


def _accuracy(rows: Records) -> Plot:
    return Plot(
        title="Accuracy of the three networks",
        x="steps",
        y="right on test, %",
        series=series_by_arm(rows, "step", "test_top1", times=100),
        caption=caption(rows, BAND),
        table="accuracy",
    )


def _typical(column: str) -> Callable[[Records], float]:
    """Picks the geometric mean over layers and steps."""
    return lambda rows: math.exp(sum(math.log(max(value, 1e-300)) for value in numbers(rows, column)) / len(rows))


def _plot(shifts: Records, column: str, title: str) -> Plot:
    labels = {"cosine": "cos(G, G')", "relative": "||G - G'|| / ||G||"}
    over_layers = [
        {"arm": arm, "seed": seed, "step": step, column: mean(column)(rows)}
        for arm in distinct(shifts, "arm")
        for seed in seeds(shifts)
        for step in distinct(shifts, "step")
        if (rows := where(shifts, arm=arm, seed=seed, step=step))
    ]
    return Plot(
        title=title,
        x="steps",
        y=labels[column],
        series=series_by_arm(over_layers, "step", column),
        caption=f"{plural(len(seeds(shifts)), 'seed')}, mean of {len(distinct(shifts, 'layer'))} layers; {BAND}",
        table="shift",
        log_y=column == "relative",
    )


STUDY = Study(
    name="covariate-shift",
    title="Internal covariate shift",
    claim="""Batch normalisation helps because it reduces internal covariate shift: the change of a layer's inputs as
    the layers before it are updated.""",
    source="""Ioffe & Szegedy 2015, title and sec. 2; judged as Santurkar et al. 2018, How Does Batch Normalization Help
    Optimization?, sec. 2.2 and Def. 2.1, judged it, who found against it""",
    protocol=f"""One network without BN, with BN, and with noisy BN: after each BN, for each channel and step anew, a
    shift of up to {SHIFT:g} (standard deviations, while gamma is 1) and a scaling by a factor of up to {SCALE:g}, and
    a little more for each value. 150 steps (full: 10,000) of the recipe for the photos (quick, digits: at 16 px),
    without dropout; same initial weights and batches (without BN the weights are scaled on a batch so that each layer
    begins with outputs of a mean square of 1), the learning rate the best of {_TRIED} by val for each arm and seed.
    Shift of a layer at a step: G, the gradient of the step's loss with respect to its weights before the step, against
    G', the same on the same batch with all layers before it as the step left them (and their noise drawn anew); of
    {_LAYERS} layers at {_LOOKS} steps. cos(G, G') is averaged, ||G - G'|| / ||G|| as logarithms. Santurkar et al.
    trained VGG on CIFAR-10.""",
    rule=f"""Three clauses: the cosine is higher with BN than without (difference above 0), the relative distance is
    lower (ratio below 1), and noisy BN does not help (its test accuracy less that without BN is below {_HELPED:g}
    points), which is asked only of seeds in which BN itself does help, and noisy BN has more shift than there is
    without BN (ratio of the distances above 1), and shown only where that is in all. Each by its 95% interval over
    seeds. A seed in which an arm ends no better than guessing gives no number for what is compared with it.""",
    measure=measure,
    conclude=conclude,
)
