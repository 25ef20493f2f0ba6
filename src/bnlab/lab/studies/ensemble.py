"""Paper 4.2.3 and Fig. 4: one crop, 144 crops, and an ensemble of networks that were trained differently."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from bnlab.classifier.ensemble import mean_of
from bnlab.classifier.predict import Classifier, Probabilities
from bnlab.data.photos import Photos
from bnlab.data.preprocess import Crops, open_photo, tta_crops
from bnlab.lab.experiment import WITH_BN, Experiment
from bnlab.lab.measurements import JobContext
from bnlab.lab.plots import BARS, caption, category_series
from bnlab.lab.records import (
    Records,
    Results,
    Row,
    average,
    by_seed,
    distinct,
    learnt_threshold,
    mean,
    numbers,
    resolution,
    seeds,
    where,
)
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.trained_network import TrainedNetwork, train
from bnlab.lab.verdict import Evidence
from bnlab.recipe import Recipe
from bnlab.report.plots import Plot
from bnlab.training.build import card_of

CROPS: tuple[Crops, ...] = (1, 10, 144)
ONE, ALL = "one network", "ensemble"
# What makes the members differ, beside their first weights and their order: dropout, as in the paper.
DROPOUTS = (0.0, 0.05, 0.1)


def measure(experiment: Experiment) -> Results:
    """For each seed a few networks on one split, alone and together, at each number of crops."""
    members = experiment.by_budget(3, 6)
    recipe = experiment.recipe(
        experiment.network_pair()[WITH_BN], steps=experiment.by_budget(200, 0), validate_every=10**6
    )
    mirrored = experiment.splits.kind == "photos"
    measurements = [
        experiment.measurement(
            answers,
            seed,
            recipe=recipe,
            members=members,
            mirrored=mirrored,
            steps=2 * members * (recipe.steps or recipe.epochs * len(experiment.splits) // recipe.batch_size),
        )
        for seed in experiment.seeds
    ]
    return experiment.run(measurements)


def answers(job: JobContext, recipe: Recipe, members: int, mirrored: bool) -> Results:
    """Train the members one after the other; how often each is right, and all together."""
    each: dict[Crops, list[Probabilities]] = {number: [] for number in CROPS}
    rows: Records = []
    for member in range(members):
        own = replace(job, folder=job.folder / str(member), seed=1000 * (job.seed + 1) + member)
        trained = train(own, recipe.model_copy(update={"dropout": DROPOUTS[member % len(DROPOUTS)]}))
        photos = trained.dataset.in_split("test")
        targets = photos.class_indices(trained.dataset.classes)
        if not trained.diverged:
            trained.recalibrate()
        for number in CROPS:
            each[number].append(_probabilities(trained, photos, number, mirrored))
            rows.append(_row(ONE, member, number, each[number][-1], targets))
    rows += [_row(ALL, None, number, mean_of(each[number]), targets) for number in CROPS]
    return {"accuracy": [row | {"guess": trained.majority_baseline} for row in rows]}


def _probabilities(trained: TrainedNetwork, photos: Photos, number: Crops, mirrored: bool) -> Probabilities:
    """N x classes, NaN of a network that diverged; of grey digits without the mirror images, which are other signs."""
    if trained.diverged:
        return np.full((len(photos), len(trained.dataset.classes)), np.nan, dtype=np.float32)
    network, preprocessing = trained.context.network, trained.context.preprocessing
    classifier = Classifier(network, card_of(trained.context), trained.context.device)
    found = [
        classifier.probabilities(
            tta_crops(open_photo(path), preprocessing, number).copy(), flip_tta=mirrored and number > 1
        ).mean(0)
        for path in photos.paths
    ]
    return np.stack(found)  # N x classes


def _row(arm: str, member: int | None, number: Crops, found: Probabilities, targets: Any) -> Row:
    top1 = float((found.argmax(1) == targets).mean()) if np.isfinite(found).all() else math.nan
    return {"arm": arm, "member": member, "crops": number, "test_top1": top1, "n_test": len(targets)}


def conclude(results: Results) -> Conclusion:
    """Each gain against the one network, which is the mean of the members."""
    rows = results["accuracy"]
    lost = {seed: why for seed in seeds(rows) if (why := _lost(where(rows, seed=seed)))}
    known = [row for row in rows if row["seed"] not in lost]
    paired: Records = [row | {"test_top1": math.nan} if row["seed"] in lost else row for row in rows]

    def accuracy(arm: str, number: int) -> list[float]:
        return by_seed(paired, mean("test_top1"), arm=arm, crops=number)

    def gain(first: tuple[str, int], second: tuple[str, int]) -> tuple[float, ...]:
        return tuple(100 * (a - b) for a, b in zip(accuracy(*first), accuracy(*second), strict=True))

    points: dict[str, Any] = {"above": 0.0, "unit": "points", "resolution": resolution(rows)}
    order = distinct(rows, "crops")
    return Conclusion(
        evidence=(
            Evidence(what="144 crops are right more often than one", values=gain((ONE, 144), (ONE, 1)), **points),
            Evidence(
                what="the ensemble is right more often than one network, at 144 crops",
                values=gain((ALL, 144), (ONE, 144)),
                **points,
            ),
            Evidence(
                what="the ensemble is right more often than one network, at one crop",
                values=gain((ALL, 1), (ONE, 1)),
                primary=False,
                **points,
            ),
            Evidence(
                what="10 crops are right more often than one",
                values=gain((ONE, 10), (ONE, 1)),
                primary=False,
                **points,
            ),
        ),
        plots={
            "accuracy": Plot(
                title="Accuracy by crops, alone and together",
                x="crops of each photo",
                y="right on test, %",
                series=tuple(
                    category_series(arm, where(known, arm=arm), "crops", "test_top1", order, times=100)
                    for arm in (ONE, ALL)
                ),
                caption=caption(rows, BARS + "; of one network over its members too"),
                table="accuracy",
                categories=[str(number) for number in order],
            )
        },
        numbers={
            f"error of {arm}, {number} crop{'s' * (number != 1)}, %": 100
            * (1 - average(where(known, arm=arm, crops=number), "test_top1"))
            for arm in (ONE, ALL)
            for number in CROPS
        },
        remarks=tuple(f"seed {seed}: {why}, so it shows nothing" for seed, why in lost.items()),
    )


def _lost(rows: Records) -> str:
    """Why a seed shows nothing, or ""."""
    ones = where(rows, arm=ONE)
    diverged = distinct([row for row in ones if math.isnan(*numbers([row], "test_top1"))], "member")
    if diverged:
        return f"of its members, counted from 0, there diverged {', '.join(map(str, diverged))}"
    return "" if max(numbers(rows, "test_top1")) > learnt_threshold(rows[0]) else "no member learnt anything"


STUDY = Study(
    name="ensemble",
    title="Crops and ensembles",
    claim="""Averaging probabilities over 144 crops of an image lowers the error (from 25.2% to 21.99% on ImageNet), and
    averaging over an ensemble of networks that were trained differently lowers it further (to 20.1%).""",
    source="Ioffe & Szegedy 2015, sec. 4.2.3 and Fig. 4",
    protocol="""For each seed, networks with batch normalisation are trained on one split, from other first weights, in
    another order and with dropout of 0, 5 or 10% (3 networks quick, 6 in full; the paper's six differ in the scale of
    the first weights and in per-activation normalisation, too). Each is asked about the test photos at 1, 10 and 144
    crops, by statistics measured anew, and the probabilities are averaged. Of digits the mirror images, half of the
    crops, are left out. "One network" is the mean of the members. A seed with a member that diverged shows nothing, for
    an ensemble would be one of fewer, and counted as guessing that member would make the gain over one network larger;
    nor does a seed whose best is no better than guessing. Quick: small Inception at 32 px, 200 steps.""",
    rule="""Two clauses decide: accuracy of one network at 144 crops less that at one crop, and accuracy of the ensemble
    less that of one network, both at 144 crops; each above 0 by its 95% interval over seeds.""",
    measure=measure,
    conclude=conclude,
)
