"""Paper 3.4 and Luo et al. 2019: BN regularises by the noise of its batches, and dropout can go."""

import hashlib
import math
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bnlab.data.photos import Photo
from bnlab.data.split_csv import read_split_csv, write_split_csv
from bnlab.errors import plural
from bnlab.lab.clauses import points_clause
from bnlab.lab.experiment import WITH_BN, WITHOUT_BN, Experiment
from bnlab.lab.lr_selection import chosen, lr_remarks, mark_chosen
from bnlab.lab.measurements import JobContext
from bnlab.lab.plots import BARS, caption, category_plot
from bnlab.lab.records import (
    Records,
    Results,
    Row,
    average,
    differences,
    distinct,
    last,
    learnt_threshold,
    number,
    where,
)
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.trained_network import majority_baseline, train, with_norm
from bnlab.lab.verdict import Evidence
from bnlab.norm import kernels, moments
from bnlab.norm.kernels import Running
from bnlab.norm.layers import BatchNorm
from bnlab.recipe import Recipe
from bnlab.report.plots import Plot

RENORMALISED = "with BN, no noise"
KINDS = (WITHOUT_BN, WITH_BN, RENORMALISED)
BATCHES = (8, 32, 128)
USUAL = 32  # photos to a batch: the paper's
DROPOUT = 0.4  # the paper's baseline's
RATES = (0.005, 0.03, 0.18)  # at the usual batch
EQUAL = 0.03  # the rate of a secondary comparison, which both arms have
_MARGIN = 2.0  # points of accuracy: dropout that gains less is dispensable


class Renormalisation(BatchNorm):
    """Batch renormalisation without clipping, which has the batch's gradients without the batch's noise.

    y = ((x - E[x]) / sqrt(Var[x] + eps) * r + d) * gamma + beta    (Ioffe 2017, arXiv 1702.03275, Alg. 1)

    with r = sqrt(Var[x] + eps) / sqrt(var + eps) and d = (E[x] - mean) / sqrt(var + eps), both without gradient, for
    the batch's E and Var (biased) and the running mean and var (unbiased). So the value of y is that of
    (x - mean) / sqrt(var + eps) * gamma + beta, but its gradient treats E and Var as functions of x.

    The running statistics are the average of the batches before this one: a moving average in which the new batch has
    the weight `momentum`, or 1 / n as the n-th batch if that is more, so that at first it is their plain average. The
    first batch is normalised by its own statistics. N x C x ... in and out.
    """

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
        batches = 0 if self.num_batches_tracked is None else int(self.num_batches_tracked)
        if running is None:
            return super()._transform(input, weight, bias, running, eps, relu=relu)
        found = moments.measure(input.detach())
        if batches:
            assert weight is not None and bias is not None
            scale = torch.sqrt(running.var + eps)  # C
            mean, var = found.mean.to(scale), found.variance(unbiased=False).to(scale)  # C, C
            r, d = torch.sqrt(var + eps) / scale, (mean - running.mean) / scale  # C, C
            weight, bias = weight * r, bias + weight * d
        y = kernels.by_batch(input, weight, bias, None, eps).y  # N x C x ...
        moved = kernels.update_running(running._replace(momentum=max(running.momentum, 1 / (1 + batches))), found)
        return F.relu(y, inplace=True) if relu else y, moved


def measure(experiment: Experiment) -> Results:
    same: dict[str, Any] = {
        "epochs": experiment.by_budget(40, 200),
        "weight_decay": 0.0,
        "crop_area": (1.0, 1.0),
        "crop_aspect": (1.0, 1.0),
        "flip": 0.0,
        "validate_every": 100_000,
    }
    if experiment.budget == "quick":
        same |= {"size": 28, "activation": "relu", "resize": "squash"}
    networks = experiment.by_budget({WITH_BN: "bn_mlp", WITHOUT_BN: "mlp"}, experiment.network_pair())
    recipes = {kind: experiment.recipe(networks.get(kind, networks[WITH_BN]), **same) for kind in KINDS}
    photos = experiment.by_budget(256, 2560)
    measurements = [
        experiment.measurement(
            train_for_gap,
            seed,
            labels={"arm": arm(kind, batch, dropout), "learning_rate": rate},
            recipe=recipe.model_copy(
                update={"batch_size": batch, "dropout": dropout, "learning_rate": rate * math.sqrt(batch / USUAL)}
            ),
            kind=kind,
            photos=photos,
            steps=recipe.steps or recipe.epochs * -(-photos // batch),
        )
        for kind, recipe in recipes.items()
        for batch in BATCHES
        for dropout in (0.0, DROPOUT)
        if not (dropout and kind == RENORMALISED)
        for rate in RATES
        for seed in experiment.seeds
    ]
    return mark_chosen(experiment.run(measurements))


def arm(kind: str, batch: int, dropout: float = 0.0) -> str:
    return f"{kind}, batch {batch}, dropout {dropout:g}"


def train_for_gap(job: JobContext, recipe: Recipe, kind: str, photos: int) -> Results:
    """One training on so many photos, and its final accuracy and loss on them and on test, seen as in inference."""
    job = replace(job, split=fewer(job, photos))
    trained = train(job, recipe, make=with_norm(Renormalisation) if kind == RENORMALISED else None)
    dataset = trained.context.dataset
    guess = majority_baseline(dataset)
    row: Row = {"kind": kind, "batch": recipe.batch_size, "dropout": recipe.dropout, "guess": guess}
    if trained.diverged:
        loss, n_test = math.log(len(dataset.classes)), len(dataset.in_split("test"))
        row |= {"train_top1": guess, "test_top1": guess, "train_loss": loss, "test_loss": loss, "n_test": n_test}
    else:
        for split in ("train", "test"):
            found = trained.evaluation(split, "recalibrated", images=recipe.recalibration_images)
            row |= {f"{split}_top1": found.top1, f"{split}_loss": found.loss, f"n_{split}": found.n}
    return {"accuracy": trained.results["accuracy"], "gap": [row]}


def fewer(job: JobContext, photos: int) -> Path:
    """The job's split.csv with at most so many photos of train: equally many of each class, and at least one."""
    listed = list(read_split_csv(job.split))
    most = max(1, photos // len({photo.label for photo in listed}))
    of_train: Counter[str] = Counter()
    kept: list[Photo] = []
    for photo in listed:
        of_train[photo.label] += photo.split == "train"
        if photo.split != "train" or of_train[photo.label] <= most:
            kept.append(photo)
    digest = hashlib.sha256(repr(kept).encode()).hexdigest()[:16]
    path = job.split.with_name(f"{job.split.stem}-{digest}.csv")
    if not path.exists():
        write_split_csv(path, kept)
    return path


def conclude(results: Results) -> Conclusion:
    rows = [row | _gaps(row) for row in chosen(results, "gap")]
    equal = [row | _gaps(row) for row in where(results["gap"], learning_rate=EQUAL)]
    small, usual, large = BATCHES

    def less(column: str, first: str, second: str, rows: Records = rows) -> list[float]:
        return differences(rows, first, second, last(column))

    def mean_of(column: str, *which: Any) -> float:
        return average(where(rows, arm=arm(*which)), column)

    points, nats = partial(points_clause, tested=rows), partial(Evidence, unit="nats")
    accuracy, loss, test = "accuracy_gap", "loss_gap", "learnt_points"
    at_usual, at_small = f"(batch {usual}, no dropout)", f"(batch {small}, no dropout)"
    bn = arm(WITH_BN, usual), arm(WITHOUT_BN, usual)
    noise = arm(RENORMALISED, small), arm(WITH_BN, small)
    dropouts, batches = (bn[0], arm(WITH_BN, usual, DROPOUT)), (arm(WITH_BN, large), arm(WITH_BN, small))
    silenced, rate = "without the batches' noise BN's", f"{EQUAL * math.sqrt(small / usual):g}"
    at_one_rate = f"{silenced} gap in loss is larger, both at a rate of {rate}"
    by_batch = f"with BN the gap in loss is larger at batch {large} than at {small}"
    without_dropout = f"with BN, accuracy without dropout less that with it (batch {usual})"
    lost = [row for row in rows if math.isnan(number(row, test))]
    return Conclusion(
        evidence=(
            points(f"with BN the gap in accuracy is smaller {at_usual}", less(accuracy, *bn), below=0),
            nats(f"with BN the gap in loss is smaller {at_usual}", less(loss, *bn), below=0),
            points(f"{silenced} gap in accuracy is larger {at_small}", less(accuracy, *noise), above=0),
            nats(f"{silenced} gap in loss is larger {at_small}", less(loss, *noise), above=0),
            points(without_dropout, less(test, *dropouts), above=-_MARGIN),
            nats(at_one_rate, less(loss, *noise, equal), above=0, primary=False),
            nats(by_batch, less(loss, *batches), above=0, primary=False),
            points(f"with BN the test accuracy is higher {at_usual}", less(test, *bn), above=0, primary=False),
            points(f"{silenced} test accuracy is lower {at_small}", less(test, *noise), below=0, primary=False),
        ),
        plots={
            "gap in accuracy": _plot(rows, accuracy, "Gap in accuracy", "train less test accuracy, points"),
            "gap in loss": _plot(rows, loss, "Gap in loss", "test less train loss, nats"),
            "accuracy": _plot(rows, "test_points", "Accuracy on test", "test accuracy, %"),
        },
        numbers={
            f"accuracy that dropout gives {kind}, batch {usual}, points": mean_of("test_points", kind, usual, DROPOUT)
            - mean_of("test_points", kind, usual)
            for kind in (WITHOUT_BN, WITH_BN)
        }
        | {
            f"train accuracy {kind}, no dropout, batch {batch}, %": mean_of("train_points", kind, batch)
            for kind in KINDS
            for batch in BATCHES
        },
        remarks=(
            *lr_remarks(results),
            *(
                f"{name}: learnt nothing with {plural(len(where(lost, arm=name)), 'seed')}, which show nothing"
                for name in distinct(lost, "arm")
            ),
        ),
    )


def _gaps(row: Row) -> Row:
    """Percentages and gaps; NaN in place of what would compare a network that learnt nothing of train."""
    train, test = (100 * number(row, f"{split}_top1") for split in ("train", "test"))
    learnt = number(row, "train_top1") > learnt_threshold(row)
    return {
        "train_points": train,
        "test_points": test,
        "learnt_points": test if learnt else math.nan,
        "accuracy_gap": train - test if learnt else math.nan,
        "loss_gap": number(row, "test_loss") - number(row, "train_loss") if learnt else math.nan,
    }


def _plot(rows: Records, column: str, title: str, y: str) -> Plot:
    known = [row for row in rows if math.isfinite(number(row, column))]
    groups = {
        f"{kind}, dropout {dropout}" if dropout else kind: where(known, kind=kind, dropout=dropout)
        for kind in KINDS
        for dropout in distinct(where(known, kind=kind), "dropout")
    }
    about: dict[str, Any] = {"title": title, "x": "photos to a batch", "y": y, "table": "gap"}
    return category_plot(groups, "batch", column, BATCHES, caption=caption(rows, BARS), **about)


STUDY = Study(
    name="regularisation",
    title="Batch normalisation as a regulariser",
    claim="""Batch normalisation regularises a network, so that dropout can be removed or reduced in strength, and what
    regularises is the noise of the batches.""",
    source="""Ioffe & Szegedy 2015, sec. 3.4; Luo et al. 2019, Towards Understanding Regularization in Batch
    Normalization""",
    protocol=f"""Three hidden layers of 100 ReLU units at 28 px (full: the network of most studies) are trained with BN,
    without it, and with BN of the same gradients but without its noise: batch renormalisation (Ioffe 2017) without
    clipping, which normalises by the statistics of about the last 20 batches. They are trained on at most 256 photos
    (full: 2560), equally many of each class and at least one, for 40 epochs (full: 200), without crops or weight decay,
    so that they overfit. The batches are of {BATCHES[0]}, {BATCHES[1]} and {BATCHES[2]} photos; each photo is seen
    equally often, because it is by visits that a photo is memorised. Dropout before the last layer is {DROPOUT} (that
    of the paper's baseline) or none. The initial weights are the same. The learning rate is the best by val accuracy of
    {", ".join(f"{rate:g}" for rate in RATES)} times sqrt(batch / {USUAL}), for each arm and seed. An arm that is no
    better than guessing on train has learnt nothing, and its seed shows nothing. The gaps are train less test
    accuracy, and test less train loss, all by recalibrated statistics, on photos as inference sees them.""",
    rule=f"""There are five clauses. Both gaps are smaller with BN at batch {USUAL} without dropout; both are larger
    without the noise at batch {BATCHES[0]}, where the noise is largest; and with BN, training without dropout costs
    less than {_MARGIN:g} points of test accuracy. This margin is less than the 2.6 points that the paper's BN-x30,
    which has no dropout, gained on Inception. Each is decided by its 95% interval over seeds.""",
    measure=measure,
    conclude=conclude,
    own_keys=("batch_size",),
)
