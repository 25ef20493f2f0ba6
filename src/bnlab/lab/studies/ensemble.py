"""Paper 4.2.3 and Fig. 4: one crop, 144 crops, and an ensemble of networks that were trained differently."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from bnlab.classifier.ensemble import mean_of
from bnlab.classifier.predict import Classifier, Probabilities
from bnlab.data.photo_file import open_photo
from bnlab.data.photos import Photos
from bnlab.data.preprocess import Crops, tta_crops
from bnlab.lab.clauses import points_clause, without_seeds
from bnlab.lab.experiment import WITH_BN, Experiment
from bnlab.lab.measurements import JobContext
from bnlab.lab.plots import BARS, caption, category_plot
from bnlab.lab.records import Records, Results, Row, gained, learnt_threshold, mean, number, numbers, seeds, where
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.trained_network import TrainedNetwork, majority_baseline, train
from bnlab.recipe import Recipe
from bnlab.training.build import card_of

CROPS: tuple[Crops, ...] = (1, 10, 144)
ONE, ALL = "one network", "ensemble"
# The members also differ in their dropout, as the paper's do, and not only in their first weights and order.
DROPOUTS = (0.0, 0.05, 0.1)


def measure(experiment: Experiment) -> Results:
    """Trains a few networks on the split of each seed, and tests each of them and all together at all crops."""
    network, members = experiment.network_pair()[WITH_BN], experiment.by_budget(3, 6)
    recipe = experiment.recipe(network, steps=experiment.by_budget(200, 0), validate_every=10**6)
    steps = recipe.steps or recipe.epochs * len(experiment.splits) // recipe.batch_size
    mirrored = experiment.splits.kind == "photos"
    about: dict[str, Any] = {"members": members, "mirrored": mirrored, "steps": 2 * members * steps}
    return experiment.run(
        [experiment.measurement(train_members, seed, recipe=recipe, **about) for seed in experiment.seeds]
    )


def train_members(job: JobContext, recipe: Recipe, members: int, mirrored: bool) -> Results:
    """Trains the members one after the other, and measures the accuracy of each and of their mean probabilities."""
    each: dict[Crops, list[Probabilities]] = {crops: [] for crops in CROPS}
    rows: Records = []
    for member in range(members):
        own = replace(job, folder=job.folder / str(member), seed=1000 * (job.seed + 1) + member)
        trained = train(own, recipe.model_copy(update={"dropout": DROPOUTS[member % len(DROPOUTS)]}))
        photos = trained.context.dataset.in_split("test")
        targets = photos.class_indices(trained.context.dataset.classes)
        if not trained.diverged:
            trained.recalibrate()
        for crops in CROPS:
            each[crops].append(_probabilities(trained, photos, crops, mirrored))
            rows.append(_row(ONE, member, crops, each[crops][-1], targets))
    rows += [_row(ALL, None, crops, mean_of(each[crops]), targets) for crops in CROPS]
    return {"accuracy": [row | {"guess": majority_baseline(trained.context.dataset)} for row in rows]}


def _probabilities(trained: TrainedNetwork, photos: Photos, crops: Crops, mirrored: bool) -> Probabilities:
    """The mean over crops and, where `mirrored`, their mirror images: N x classes; NaN for a diverged network."""
    if trained.diverged:
        return np.full((len(photos), len(trained.context.dataset.classes)), np.nan, dtype=np.float32)
    context, found = trained.context, []
    classifier = Classifier(context.network, card_of(context))
    for path in photos.paths:
        pixels = tta_crops(open_photo(path), context.preprocessing, crops).copy()  # crops x size x size x 3
        found.append(classifier.probabilities(pixels, flip_tta=mirrored and crops > 1).mean(0))
    return np.stack(found)  # N x classes


def _row(arm: str, member: int | None, crops: Crops, found: Probabilities, targets: Any) -> Row:
    top1 = float((found.argmax(1) == targets).mean()) if np.isfinite(found).all() else math.nan
    return {"arm": arm, "member": member, "crops": crops, "test_top1": top1, "n_test": len(targets)}


def conclude(results: Results) -> Conclusion:
    """Compares 144 crops with one, and the ensemble with one network, which is the mean of the members."""
    rows = results["accuracy"]
    lost = {seed: why for seed in seeds(rows) if (why := _lost(where(rows, seed=seed)))}
    known = [row for row in rows if row["seed"] not in lost]
    paired = without_seeds(rows, lost, "test_top1")
    clause, top1 = partial(points_clause, tested=rows, above=0.0), mean("test_top1")

    def by_crops(crops: int) -> list[float]:
        return gained(where(paired, arm=ONE), crops, 1, top1, column="crops")

    def by_members(crops: int) -> list[float]:
        return gained(where(paired, crops=crops), ALL, ONE, top1)

    better = "the ensemble is right more often than one network"
    return Conclusion(
        evidence=(
            clause("144 crops are right more often than one", by_crops(144)),
            clause(f"{better}, at 144 crops", by_members(144)),
            clause(f"{better}, at one crop", by_members(1), primary=False),
            clause("10 crops are right more often than one", by_crops(10), primary=False),
        ),
        plots={
            "accuracy": category_plot(
                {arm: where(known, arm=arm) for arm in (ONE, ALL)},
                "crops",
                "test_top1",
                CROPS,
                times=100,
                title="Accuracy by crops, alone and together",
                x="crops of each photo",
                caption=caption(rows, BARS + "; of one network over its members too"),
                table="accuracy",
            )
        },
        numbers={
            f"error of {arm}, {n} crop{'s' * (n != 1)}, %": 100 * (1 - top1(where(known, arm=arm, crops=n)))
            for arm in (ONE, ALL)
            for n in CROPS
        },
        remarks=tuple(f"seed {seed}: {why}, so it shows nothing" for seed, why in lost.items()),
    )


def _lost(rows: Records) -> str:
    """Why a seed shows nothing; empty if it shows something."""
    diverged = [row["member"] for row in where(rows, arm=ONE, crops=1) if math.isnan(number(row, "test_top1"))]
    if diverged:
        return f"of its members, counted from 0, there diverged {', '.join(map(str, diverged))}"
    return "" if max(numbers(rows, "test_top1")) > learnt_threshold(rows[0]) else "no member learnt anything"


STUDY = Study(
    name="ensemble",
    title="Crops and ensembles",
    claim="""Averaging probabilities over 144 crops of an image lowers the error (from 25.2% to 21.99% on ImageNet), and
    averaging over an ensemble of networks that were trained differently lowers it further (to 20.1%).""",
    source="Ioffe & Szegedy 2015, sec. 4.2.3 and Fig. 4",
    protocol="""For each seed, three networks (full: six) with batch normalisation are trained on one split. They differ
    in their first weights, in the order of the photos, and in their dropout of 0, 5 or 10%; the paper's six also differ
    in the scale of the first weights and in per-activation normalisation. Each network classifies the test photos at
    1, 10 and 144 crops, by recalibrated statistics, and the probabilities are averaged. Mirror images, which are half
    of the crops, are left out for digits. "One network" is the mean of the members. A seed with a diverged member shows
    nothing: an ensemble without that member would be smaller, and a member that counted as guessing would make the gain
    over one network larger. A seed whose best network is no better than guessing shows nothing either. Quick: small
    Inception at 32 px, 200 steps.""",
    rule="""There are two primary clauses. The accuracy of one network at 144 crops, less that at one crop, is above 0;
    and the accuracy of the ensemble, less that of one network, is above 0 at 144 crops. Each is decided by its 95%
    interval over seeds.""",
    measure=measure,
    conclude=conclude,
)
