"""Paper 3.4 and Luo et al. 2019: BN regularises by the noise of its batches, and dropout can go."""

import hashlib
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bnlab.data.photos import Photo
from bnlab.data.split_csv import read_split_csv, write_split_csv
from bnlab.errors import plural
from bnlab.lab.clauses import points_clause
from bnlab.lab.experiment import WITH_BN, WITHOUT_BN, Experiment
from bnlab.lab.lr_selection import chosen, lr_remarks, mark_chosen
from bnlab.lab.measurements import JobContext
from bnlab.lab.plots import BARS, caption, category_plot
from bnlab.lab.records import Records, Results, Row, average, by_seed, distinct, last, learnt_threshold, number, where
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
EQUAL = 0.03  # the rate of a secondary comparison, which both arms have
_MARGIN = 2.0  # points of accuracy: dropout that gains less is dispensable


def measure(experiment: Experiment) -> Results:
    """Trains every kind of network with every batch size, with and without dropout, at each rate."""
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


def train_for_gap(job: JobContext, recipe: Recipe, kind: str, photos: int) -> Results:
    """One training on so many photos, and its final accuracy and loss on them and on test, seen as in inference."""
    job = replace(job, split=fewer(job, photos))
    trained = train(job, recipe, make=with_norm(Renormalisation) if kind == RENORMALISED else None)
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
    """The job's split.csv with at most so many photos of train: equally many of each class, and at least one."""
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
    """Compares the gaps between train and test by kind of network, and measures what dropout gains."""
    rows = [row | _gaps(row) for row in chosen(results, "gap")]
    equal = [row | _gaps(row) for row in where(results["gap"], learning_rate=EQUAL)]
    small, usual, large = BATCHES
    with_bn, without, no_noise = (
        partial(dict[str, Any], kind=kind, dropout=0.0) for kind in (WITH_BN, WITHOUT_BN, RENORMALISED)
    )

    def less(column: str, first: dict[str, Any], second: dict[str, Any], rows: Records = rows) -> tuple[float, ...]:
        ours, theirs = (by_seed(rows, last(column), **which) for which in (first, second))
        return tuple(a - b for a, b in zip(ours, theirs, strict=True))

    points, nats = partial(points_clause, tested=rows), partial(Evidence, unit="nats")
    accuracy, loss, test = "accuracy_gap", "loss_gap", "learnt_points"
    at_usual, at_small = f"(batch {usual}, no dropout)", f"(batch {small}, no dropout)"
    bn = with_bn(batch=usual), without(batch=usual)
    noise = no_noise(batch=small), with_bn(batch=small)
    silenced, rate = "without the batches' noise BN's", f"{EQUAL * math.sqrt(small / usual):g}"
    return Conclusion(
        evidence=(
            points(f"with BN the gap in accuracy is smaller {at_usual}", less(accuracy, *bn), below=0),
            nats(what=f"with BN the gap in loss is smaller {at_usual}", values=less(loss, *bn), below=0),
            points(f"{silenced} gap in accuracy is larger {at_small}", less(accuracy, *noise), above=0),
            nats(what=f"{silenced} gap in loss is larger {at_small}", values=less(loss, *noise), above=0),
            points(
                f"with BN, accuracy without dropout less that with it (batch {usual})",
                less(test, with_bn(batch=usual), with_bn(batch=usual, dropout=DROPOUT)),
                above=-_MARGIN,
            ),
            nats(
                what=f"{silenced} gap in loss is larger, both at a rate of {rate}",
                values=less(loss, *noise, equal),
                above=0,
                primary=False,
            ),
            nats(
                what=f"with BN the gap in loss is larger at batch {large} than at {small}",
                values=less(loss, with_bn(batch=large), with_bn(batch=small)),
                above=0,
                primary=False,
            ),
            points(f"with BN the test accuracy is higher {at_usual}", less(test, *bn), above=0, primary=False),
            points(f"{silenced} test accuracy is lower {at_small}", less(test, *noise), below=0, primary=False),
        ),
        plots={
            "gap in accuracy": _plot(rows, accuracy, "Gap in accuracy", "train less test accuracy, points"),
            "gap in loss": _plot(rows, loss, "Gap in loss", "test less train loss, nats"),
            "accuracy": _plot(rows, "test_points", "Accuracy on test", "test accuracy, %"),
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
        remarks=lr_remarks(results) + _learnt_nothing(rows),
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


def _learnt_nothing(rows: Records) -> tuple[str, ...]:
    lost = [row for row in rows if math.isnan(number(row, "learnt_points"))]
    return tuple(
        f"{arm}: learnt nothing with {plural(len(where(lost, arm=arm)), 'seed')}, which show nothing"
        for arm in distinct(lost, "arm")
    )


def _plot(rows: Records, column: str, title: str, y: str) -> Plot:
    known = [row for row in rows if math.isfinite(number(row, column))]
    groups = {
        f"{kind}, dropout {dropout}" if dropout else kind: where(known, kind=kind, dropout=dropout)
        for kind in KINDS
        for dropout in distinct(where(known, kind=kind), "dropout")
    }
    return category_plot(
        groups,
        "batch",
        column,
        BATCHES,
        title=title,
        x="photos to a batch",
        y=y,
        caption=caption(rows, BARS),
        table="gap",
    )


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
