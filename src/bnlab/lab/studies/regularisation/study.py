"""Paper 3.4 and Luo et al. 2019: BN regularises, by the noise of its batches, and dropout can go."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from bnlab.data.photos import Photo
from bnlab.data.split_csv import read_split_csv, write_split_csv
from bnlab.errors import plural
from bnlab.lab.experiment import WITH_BN, WITHOUT_BN, Experiment
from bnlab.lab.lr_selection import chosen, lr_remarks, mark_chosen
from bnlab.lab.measurements import JobContext
from bnlab.lab.plots import BARS, caption, category_series
from bnlab.lab.records import (
    Records,
    Results,
    Row,
    average,
    by_seed,
    distinct,
    last,
    learnt_threshold,
    number,
    resolution,
    seeds,
    where,
)
from bnlab.lab.studies.regularisation.renormalisation import Renormalisation
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.trained_network import train, with_norm
from bnlab.lab.verdict import Evidence
from bnlab.recipe import Recipe
from bnlab.report.plots import Plot

RENORMALISED = "with BN, no noise"
KINDS = (WITHOUT_BN, WITH_BN, RENORMALISED)
BATCHES = (8, 32, 128)
USUAL = 32  # photos to a batch: the paper's
DROPOUT = 0.4  # the paper's baseline's
RATES = (0.005, 0.03, 0.18)  # at the usual batch
EQUAL = 0.03  # the rate at which the noise is judged too
_MARGIN = 2.0  # points of accuracy that dropout may be worth and still be called dispensable


def measure(experiment: Experiment) -> Results:
    """Every kind of network at every batch, with and without dropout, at each rate."""
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
            gap,
            seed,
            labels={"arm": f"{kind}, batch {batch}, dropout {dropout:g}", "learning_rate": rate},
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


def gap(job: JobContext, recipe: Recipe, kind: str, photos: int) -> Results:
    """A network trained on so many photos, and what it makes of them and of test's, both seen as inference does."""

    def layer(channels: int) -> nn.Module:
        return Renormalisation(channels, eps=recipe.norm_eps, momentum=recipe.norm_momentum)

    job = replace(job, split=fewer(job, photos))
    trained = train(job, recipe, make=with_norm(layer) if kind == RENORMALISED else None)
    classes, n_test, guess = (
        len(trained.dataset.classes),
        len(trained.dataset.in_split("test")),
        trained.majority_baseline,
    )
    row: Row = {"kind": kind, "batch": recipe.batch_size, "dropout": recipe.dropout, "guess": guess}
    if trained.diverged:
        of_guessing = {"train_top1": guess, "test_top1": guess}
        row |= of_guessing | {"train_loss": math.log(classes), "test_loss": math.log(classes), "n_test": n_test}
    else:
        for split in ("train", "test"):
            found = trained.evaluation(split, "recalibrated", images=recipe.recalibration_images)
            row |= {f"{split}_top1": found.top1, f"{split}_loss": found.loss, f"n_{split}": found.n}
    return {"accuracy": trained.results["accuracy"], "gap": [row]}


def fewer(job: JobContext, photos: int) -> Path:
    """The place's list with at most so many photos of train, as many of each class, but one of each at the least."""
    listed = list(read_split_csv(job.split))
    labels = {photo.label for photo in listed}
    left = dict.fromkeys(labels, max(1, photos // len(labels)))
    kept: list[Photo] = []
    for photo in listed:
        if photo.split == "train":
            left[photo.label] -= 1
        if photo.split != "train" or left[photo.label] >= 0:
            kept.append(photo)
    digest = hashlib.sha256(repr(kept).encode()).hexdigest()[:16]
    path = job.split.with_name(f"{job.split.stem}-{digest}.csv")
    if not path.exists():
        write_split_csv(path, kept)
    return path


def conclude(results: Results) -> Conclusion:
    """How much worse test is than train, by kind of network, and what dropout is worth."""
    rows = [row | _gaps(row) for row in chosen(results, "gap")]
    small, usual, large = BATCHES
    bare: dict[str, Any] = {"dropout": 0.0}
    with_bn, without, silent = ({"kind": kind, **bare} for kind in (WITH_BN, WITHOUT_BN, RENORMALISED))
    equal = [row | _gaps(row) for row in where(results["gap"], learning_rate=EQUAL)]

    def less(column: str, first: dict[str, Any], second: dict[str, Any], rows: Records = rows) -> tuple[float, ...]:
        ours, theirs = (by_seed(rows, last(column), **which) for which in (first, second))
        return tuple(a - b for a, b in zip(ours, theirs, strict=True))

    def points(what: str, values: tuple[float, ...], *, primary: bool = False, **claimed: Any) -> Evidence:
        return Evidence(
            what=what, values=values, unit="points", resolution=resolution(rows), primary=primary, **claimed
        )

    def nats(what: str, values: tuple[float, ...], *, primary: bool = False, **claimed: Any) -> Evidence:
        return Evidence(what=what, values=values, unit="nats", primary=primary, **claimed)

    accuracy, loss = "accuracy_gap", "loss_gap"
    at_usual, at_small = {"batch": usual}, {"batch": small}
    twins, noise = (with_bn | at_usual, without | at_usual), (silent | at_small, with_bn | at_small)
    dropped = (with_bn | at_usual, with_bn | at_usual | {"dropout": DROPOUT})
    bare_usual, bare_small = f"(batch {usual}, no dropout)", f"(batch {small}, no dropout)"
    silenced, rate = "without the batches' noise BN's", f"{EQUAL * math.sqrt(small / usual):g}"
    return Conclusion(
        evidence=(
            points(
                f"with BN the gap in accuracy is smaller {bare_usual}", less(accuracy, *twins), primary=True, below=0
            ),
            nats(f"with BN the gap in loss is smaller {bare_usual}", less(loss, *twins), primary=True, below=0),
            points(f"{silenced} gap in accuracy is larger {bare_small}", less(accuracy, *noise), primary=True, above=0),
            nats(f"{silenced} gap in loss is larger {bare_small}", less(loss, *noise), primary=True, above=0),
            points(
                f"with BN, accuracy without dropout less that with it (batch {usual})",
                less("learnt_points", *dropped),
                primary=True,
                above=-_MARGIN,
            ),
            nats(f"{silenced} gap in loss is larger, both at a rate of {rate}", less(loss, *noise, equal), above=0),
            nats(
                f"with BN the gap in loss is larger at batch {large} than at {small}",
                less(loss, with_bn | {"batch": large}, with_bn | at_small),
                above=0,
            ),
            points(f"with BN the test accuracy is higher {bare_usual}", less("learnt_points", *twins), above=0),
            points(f"{silenced} test accuracy is lower {bare_small}", less("learnt_points", *noise), below=0),
        ),
        plots={
            "gap in accuracy": _plot(rows, accuracy, "Gap in accuracy", "train less test accuracy, points"),
            "gap in loss": _plot(rows, loss, "Gap in loss", "test less train loss, nats"),
            "accuracy": _plot(rows, "test_points", "Accuracy on test", "right on test, %"),
        },
        numbers={
            f"accuracy that dropout gives {kind}, batch {usual}, points": average(
                where(rows, kind=kind, batch=usual, dropout=DROPOUT), "test_points"
            )
            - average(where(rows, kind=kind, batch=usual, dropout=0.0), "test_points")
            for kind in (WITHOUT_BN, WITH_BN)
        }
        | {
            f"train accuracy {kind}, no dropout, batch {batch}, %": average(
                where(rows, kind=kind, dropout=0.0, batch=batch), "train_points"
            )
            for kind in KINDS
            for batch in BATCHES
        },
        remarks=lr_remarks(results) + _untaught(rows),
    )


def _gaps(row: Row) -> Row:
    """Percentages and gaps; of a network that learnt nothing of train only those that do not compare it."""
    train, test = (100 * number(row, f"{split}_top1") for split in ("train", "test"))
    learnt = number(row, "train_top1") > learnt_threshold(row)
    return {
        "train_points": train,
        "test_points": test,
        "learnt_points": test if learnt else math.nan,
        "accuracy_gap": train - test if learnt else math.nan,
        "loss_gap": number(row, "test_loss") - number(row, "train_loss") if learnt else math.nan,
    }


def _untaught(rows: Records) -> tuple[str, ...]:
    lost = [row for row in rows if math.isnan(number(row, "learnt_points"))]
    return tuple(
        f"{arm}: learnt nothing with {plural(len(seeds(where(lost, arm=arm))), 'seed')}, which show nothing"
        for arm in distinct(lost, "arm")
    )


def _plot(rows: Records, column: str, title: str, y: str) -> Plot:
    said = caption(rows, BARS)
    rows = [row for row in rows if math.isfinite(number(row, column))]
    groups = [(kind, dropout) for kind in KINDS for dropout in distinct(where(rows, kind=kind), "dropout")]
    return Plot(
        title=title,
        x="photos to a batch",
        y=y,
        series=tuple(
            category_series(
                f"{kind}, dropout {dropout}" if dropout else kind,
                where(rows, kind=kind, dropout=dropout),
                "batch",
                column,
                BATCHES,
            )
            for kind, dropout in groups
        ),
        categories=tuple(map(str, BATCHES)),
        caption=said,
        table="gap",
    )


STUDY = Study(
    name="regularisation",
    title="Batch normalisation as a regulariser",
    claim="""Batch normalisation regularises a network, so that dropout can be removed or reduced in strength, and what
    regularises is the noise of the batches.""",
    source="""Ioffe & Szegedy 2015, sec. 3.4; Luo et al. 2019, Towards Understanding Regularization in Batch
    Normalization""",
    protocol=f"""Three hidden layers of 100 ReLU units on 28 px (full: the twins), with BN, without, and with BN of the
    same gradients but without its noise: batch renormalisation (Ioffe 2017) without clipping, which normalises by the
    statistics of the last 20 batches or so. Trained on at most 256 photos (full: 2560), as many of each class and one
    at the least, for 40 epochs (full: 200), without crops or weight decay, so that they overfit; batches of
    {BATCHES[0]}, {BATCHES[1]} and {BATCHES[2]}, each photo seen equally often, for it is by visits that a photo is
    learnt by heart. Dropout {DROPOUT} (the paper's baseline's) or none before the last layer. Same initial weights; the
    learning rate is the best by val of {", ".join(f"{rate:g}" for rate in RATES)} times sqrt(batch / {USUAL}), for each
    arm and seed. An arm no better than guessing on train has learnt nothing, and decides nothing. Gaps: train less
    test accuracy, and test less train loss, all by recalibrated statistics, on photos as inference sees them.""",
    rule=f"""Five clauses. Both gaps are smaller with BN at batch {USUAL} without dropout; both are larger without the
    noise at batch {BATCHES[0]}, where the noise is largest; with BN, leaving dropout out costs less than {_MARGIN:g}
    points of test accuracy, which is below the 2.6 that the paper's BN-x30, without dropout, gained on Inception. Each
    by its 95% interval over seeds.""",
    measure=measure,
    conclude=conclude,
    own_keys=("batch_size",),
)
