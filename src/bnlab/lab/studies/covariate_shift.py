"""Santurkar et al. 2018: does batch normalisation help because there is less internal covariate shift?"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab.lab.clauses import LearntFilter, points_clause, ratio_clause, secondary
from bnlab.lab.experiment import WITH_BN, WITHOUT_BN, Experiment
from bnlab.lab.lr_selection import chosen, lr_remarks, mark_chosen
from bnlab.lab.measurements import JobContext
from bnlab.lab.plots import BAND, accuracy_curves, caption, series_by_arm
from bnlab.lab.records import Records, Results, Row, differences, gained, geometric_mean, last, mean, ratios, where
from bnlab.lab.replay import batch_at, is_probe_step, loss_and_gradients, replaying, set_parameters
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.trained_network import Probe, train, with_norm
from bnlab.lab.verdict import Evidence
from bnlab.nets.blocks import conv_norm_acts
from bnlab.nets.network import TableNetwork
from bnlab.norm.kernels import Running
from bnlab.norm.layers import BatchNorm
from bnlab.recipe import Recipe
from bnlab.report.plots import Plot
from bnlab.training.build import TrainingContext

NOISY = "with noisy BN"
ARMS = (WITHOUT_BN, WITH_BN, NOISY)
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
EQUAL = 0.01  # the rate of a secondary comparison, in which all arms have the same
SHIFT, SCALE = 0.5, 1.25  # at most: standard deviations while gamma is 1, and a factor
SPREAD = 0.1  # of both, from value to value
_HELPED = 2.0  # points of accuracy, from which on a network counts as helped


def measure(experiment: Experiment) -> Results:
    """Trains three networks at each rate, and measures the shift during the training."""
    networks = experiment.network_pair()
    same: dict[str, Any] = {"steps": experiment.by_budget(150, 10_000), "dropout": 0.0}
    same["validate_every"] = experiment.by_budget(2, 0)
    if experiment.budget == "quick" and experiment.splits.kind == "digits":
        same["size"] = 16
    measurements = []
    for arm in ARMS:
        recipe = experiment.recipe(networks.get(arm, networks[WITH_BN]), **same)
        for rate in RATES:
            at_rate = {arm: recipe.model_copy(update={"learning_rate": rate})}
            labels = {"learning_rate": rate}
            measurements += experiment.measurements(at_rate, train_probed, labels=labels, noisy=arm == NOISY)
    return mark_chosen(experiment.run(measurements))


def train_probed(job: JobContext, recipe: Recipe, noisy: bool) -> Results:
    make = with_norm(NoisyBatchNorm) if noisy else None
    return {"accuracy": [], "shift": []} | train(job, recipe, probe=Shift(), make=make).results


class NoisyBatchNorm(BatchNorm):
    """BN whose output y is shifted and scaled in training: y * s + m, with new s and m in each step.

    For each channel, a mean mu ~ U(-0.5, 0.5) and a scale sigma ~ U(1, 1.25) are drawn; then for each value
    m ~ U(mu - 0.1, mu + 0.1) and s ~ N(sigma, 0.1^2). This is the manner of Santurkar et al. 2018; the strengths are
    bnlab's own. Inference has no noise. N x C x ... in and out.

    The noise follows from torch's seed and from `other`. So a step can be repeated with other noise in this layer and
    the same noise in all others.
    """

    other = False

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected N x C x ..., got a {input.ndim}D input")

    def _transform(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: Running | None,
        eps: float,
        *,
        relu: bool,
    ) -> tuple[Tensor, bool | Tensor]:
        if not self.training:
            return super()._transform(input, weight, bias, running, eps, relu=relu)
        y, moved = super()._transform(input, weight, bias, running, eps, relu=False)
        draw = torch.Generator(y.device).manual_seed(2 * int(torch.randint(2**31, ())) + self.other)
        channels = (1, -1) + (1,) * (input.ndim - 2)
        mu = y.new_empty(self.num_features).uniform_(-SHIFT, SHIFT, generator=draw).view(channels)  # 1 x C x 1 ...
        sigma = y.new_empty(self.num_features).uniform_(1, SCALE, generator=draw).view(channels)  # 1 x C x 1 ...
        m = mu + torch.empty_like(y).uniform_(-SPREAD, SPREAD, generator=draw)  # N x C x ...
        s = sigma + torch.empty_like(y).normal_(0, SPREAD, generator=draw)  # N x C x ...
        y = y * s + m
        return F.relu(y, inplace=True) if relu else y, moved


def set_other_noise(network: TableNetwork, rows: set[str]) -> None:
    """Have these rows of the network's table draw other noise, and all other rows the usual noise."""
    for row in network.order:
        for layer in network.get_submodule(row).modules():
            if isinstance(layer, NoisyBatchNorm):
                layer.other = row in rows


class Shift(Probe):
    """Measures how the updates of earlier layers change a layer's gradient (Santurkar et al. 2018, Def. 2.1).

    G is the gradient of the step's loss with respect to a layer's weights before the step. G' is the same on the same
    batch, after all rows of the network's table before the layer's have their parameters as the step left them, and
    new noise, if they have noise. Each row is represented by its first layer.
    """

    probe_steps = 10  # in each training
    layers = 3  # whose shift is measured, in each network

    def before(self, step: int, context: TrainingContext) -> None:
        self.weights_before: dict[str, Tensor] = {}
        if is_probe_step(step, context, self.probe_steps):
            self.weights_before = {name: p.detach().clone() for name, p in context.network.named_parameters()}

    def after(self, step: int, context: TrainingContext) -> None:
        if not self.weights_before:
            return
        parameters = dict(context.network.named_parameters())
        updated = {name: p.detach().clone() for name, p in parameters.items()}
        batch, chosen_layers = batch_at(step, context), shifted_layers(context.network, self.layers)
        with replaying(context):
            set_parameters(parameters, self.weights_before)
            _, old = loss_and_gradients(context, batch, [weight for _, weight, _ in chosen_layers], step)
            for (name, weight, earlier), gradient in zip(chosen_layers, old, strict=True):
                set_parameters(parameters, {key: updated[key] for key in parameters if key.split(".")[0] in earlier})
                set_other_noise(context.network, earlier)
                _, (new,) = loss_and_gradients(context, batch, [weight], step)
                set_parameters(parameters, self.weights_before)
                if gradient.isfinite().all() and new.isfinite().all():
                    self.write("shift", {"step": step, "layer": name, **compared(gradient, new)})
        set_other_noise(context.network, set())


def shifted_layers(network: TableNetwork, most: int) -> list[tuple[str, nn.Parameter, set[str]]]:
    """Up to `most` layers, evenly spread over the rows of the network, including the last row.

    Each is given by the name of its row, whose first layer it is, its weights, and the names of the rows before it.
    """
    rows = [name for name in network.order if conv_norm_acts(network.get_submodule(name))]
    count = min(most, len(rows) - 1)
    found = []
    for i in (round((i + 1) * (len(rows) - 1) / count) for i in range(count)):
        layer = conv_norm_acts(network.get_submodule(rows[i]))[0].layer
        found.append((rows[i], next(p for p in layer.parameters() if p.ndim > 1), set(rows[:i])))
    return found


def compared(old: Tensor, new: Tensor) -> Row:
    """||G||, ||G - G'||, their ratio and cos(G, G')."""
    a, b = old.double().flatten(), new.double().flatten()
    length, distance = float(a.norm()), float((a - b).norm())
    cosine = float(a @ b) / max(length * float(b.norm()), 1e-300)
    return {"gradient": length, "distance": distance, "relative": distance / max(length, 1e-300), "cosine": cosine}


def conclude(results: Results) -> Conclusion:
    accuracies, shifts = chosen(results), chosen(results, "shift")
    learnt = LearntFilter(accuracies)
    points = partial(points_clause, tested=accuracies)

    def gain(first: str, second: str) -> list[float]:
        return learnt.only(gained(accuracies, first, second, last("test_top1")), second)

    def distance(first: str, second: str, rows: Records = shifts, learnt: LearntFilter = learnt) -> list[float]:
        return learnt.only(ratios(rows, first, second, geometric_mean("relative")), first, second)

    def less_shift(rows: Records, learnt: LearntFilter, of_cosines: str, of_distances: str = "") -> list[Evidence]:
        cosines = learnt.only(differences(rows, WITH_BN, WITHOUT_BN, mean("cosine")), WITH_BN, WITHOUT_BN)
        distances = distance(WITH_BN, WITHOUT_BN, rows, learnt)
        moves = f"with BN a layer's gradient moves less, relative to it{of_distances}"
        return [
            Evidence(f"with BN a layer's gradient keeps its direction better{of_cosines}", cosines, above=0.0),
            ratio_clause(moves, distances, below=1.0),
        ]

    # How well noisy BN trains proves nothing if BN does not help, or if the noise adds no shift.
    more_shift, helps = distance(NOISY, WITHOUT_BN), gain(WITH_BN, WITHOUT_BN)
    counts = [times > 1 and gain_of_bn >= _HELPED for times, gain_of_bn in zip(more_shift, helps, strict=True)]
    noisy_helps = [value if known else math.nan for value, known in zip(gain(NOISY, WITHOUT_BN), counts, strict=True)]
    nothing = "in some seeds BN does not help, or noisy BN has no more shift than none: they show nothing"
    equal, accuracies_equal = (where(results[table], learning_rate=EQUAL) for table in ("shift", "accuracy"))
    at_equal = f", both at a learning rate of {EQUAL:g}"
    layers = f"mean of {len({row['layer'] for row in shifts})} layers"
    shift_plot = partial(Plot, x="steps", caption=caption(shifts, BAND, layers), table="shift")
    return Conclusion(
        evidence=(
            *less_shift(shifts, learnt, ": difference of the cosines"),
            points(
                "noisy BN, with more shift than without BN, does not help: its test accuracy less that without",
                noisy_helps,
                below=_HELPED,
            ),
            *secondary(
                ratio_clause("with noisy BN it moves more than without BN", more_shift, above=1.0),
                ratio_clause("with noisy BN it moves more than with BN", distance(NOISY, WITH_BN), above=1.0),
                *(
                    points(f"{first} the test accuracy is higher than {second}", gain(first, second), above=0.0)
                    for first, second in ((NOISY, WITHOUT_BN), (WITH_BN, NOISY), (WITH_BN, WITHOUT_BN))
                ),
                *less_shift(equal, LearntFilter(accuracies_equal), at_equal, at_equal),
            ),
        ),
        plots={
            "accuracy": accuracy_curves(accuracies, "Accuracy of the three networks"),
            "cosine": shift_plot(
                title="Direction of a layer's gradient, before and after the others' update",
                y="cos(G, G')",
                series=series_by_arm(shifts, "step", "cosine"),
            ),
            "distance": shift_plot(
                title="Move of a layer's gradient under the others' update",
                y="||G - G'|| / ||G||",
                series=series_by_arm(shifts, "step", "relative"),
                log_y=True,
            ),
        },
        numbers={f"learning rate {arm}, mean": mean("learning_rate")(where(accuracies, arm=arm)) for arm in ARMS},
        remarks=(*(() if all(counts) else (nothing,)), *learnt.remarks, *lr_remarks(results)),
    )


STUDY = Study(
    name="covariate-shift",
    title="Internal covariate shift",
    claim="""Batch normalisation helps because it reduces internal covariate shift: the change of a layer's inputs as
    the layers before it are updated.""",
    source="""Ioffe & Szegedy 2015, title and sec. 2; tested in the way of Santurkar et al. 2018, How Does Batch
    Normalization Help Optimization?, sec. 2.2 and Def. 2.1, who found against it""",
    protocol=f"""One network is trained without BN, with BN, and with noisy BN. Noise after each BN shifts each channel
    in each step by up to {SHIFT:g} (standard deviations, while gamma is 1) and scales it by up to {SCALE:g}, with a
    little more of either for each value. Trainings take 150 steps (full: 10,000) of the recipe for the photos (quick,
    digits: at 16 px), without dropout. The initial weights and batches are the same, except that without BN the weights
    are scaled on a batch so that each layer begins with outputs of mean square 1. The learning rate is the best of
    {", ".join(f"{rate:g}" for rate in RATES)} by val accuracy, for each arm and seed. The shift of a layer at a step
    compares two gradients of the step's loss with respect to its weights: G, before the step, and G', on the same batch
    with all layers before it as the step left them and with new noise. It is measured for {Shift.layers} layers at
    {Shift.probe_steps} steps; cos(G, G') is averaged, and ||G - G'|| / ||G|| as logarithms. Santurkar et al. trained
    VGG on CIFAR-10.""",
    rule=f"""There are three clauses. With BN the cosine is higher than without (the difference is above 0), and the
    relative distance is lower (the ratio is below 1). Noisy BN does not help: its test accuracy less that without BN is
    below {_HELPED:g} points. The third clause takes only seeds in which BN itself helps, and in which noisy BN has more
    shift than the network without BN (the ratio of the distances is above 1); it is shown only if all seeds are such.
    Each is decided by its 95% interval over seeds. A seed in which an arm ends no better than guessing shows nothing in
    the comparisons with that arm.""",
    measure=measure,
    conclude=conclude,
)
