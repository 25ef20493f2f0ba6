import math
from dataclasses import replace

import numpy as np
import pytest

from bnlab.classifier.predict import Classifier, classify
from bnlab.lab.measurements import JobContext
from bnlab.lab.records import Results, where
from bnlab.lab.studies.ensemble import ALL, CROPS, ONE, STUDY, train_members
from bnlab.lab.trained_network import train
from bnlab.lab.verdict import Verdict
from bnlab.training.build import card_of
from tests.lab.studies.helpers import MakeExperiment, draw, has_no_number


def planted(crops: float, ensemble: float) -> Results:
    """144 crops gain `crops`, and the ensemble `ensemble` over its members."""
    rows = []
    for seed, noise in enumerate((0.95, 1.0, 1.05)):
        for number in CROPS:
            one = 0.5 + crops * noise * (number == 144)
            for member in (0, 1):
                off = 0.01 * (2 * member - 1)
                rows.append({"arm": ONE, "seed": seed, "member": member, "crops": number, "test_top1": one + off})
            top1 = one + ensemble * noise
            rows.append({"arm": ALL, "seed": seed, "member": None, "crops": number, "test_top1": top1})
    return {"accuracy": [row | {"n_test": 500, "guess": 0.1} for row in rows]}


@pytest.mark.parametrize(
    ("crops", "ensemble", "verdict"),
    [
        (0.05, 0.05, Verdict.HOLDS),
        (-0.05, 0.05, Verdict.DOES_NOT_HOLD),
        (0.05, -0.05, Verdict.DOES_NOT_HOLD),
        (0.05, 0.0, Verdict.NOT_SHOWN),
    ],
)
def test_the_verdict_follows_from_the_numbers(crops: float, ensemble: float, verdict: Verdict) -> None:
    conclusion = STUDY.conclude(planted(crops, ensemble))
    assert conclusion.verdict == verdict
    assert conclusion.numbers["error of one network, 144 crops, %"] == pytest.approx(50 - 100 * crops)
    draw(conclusion)


@pytest.mark.parametrize("seeds", [(1,), (0, 1, 2)])
def test_a_seed_with_a_member_that_diverged_shows_nothing(seeds: tuple[int, ...]) -> None:
    results = planted(0.05, 0.05)
    for row in results["accuracy"]:
        if row["seed"] in seeds and row["member"] != 0:
            row["test_top1"] = math.nan
    conclusion = STUDY.conclude(results)
    for evidence in conclusion.evidence:
        assert has_no_number(evidence) == [seed in seeds for seed in range(3)]
    assert conclusion.verdict is Verdict.NOT_SHOWN
    assert math.isnan(conclusion.numbers["error of one network, 1 crop, %"] or 0) == (len(seeds) == 3)
    assert (
        f"seed {seeds[0]}: of its members, counted from 0, there diverged 1, so it shows nothing" in conclusion.remarks
    )
    draw(conclusion)


def test_networks_that_learnt_nothing_show_nothing() -> None:
    results = planted(0.05, 0.05)
    results["accuracy"] = [row | {"guess": 0.55} if row["seed"] == 2 else row for row in results["accuracy"]]
    conclusion = STUDY.conclude(results)
    assert has_no_number(conclusion.evidence[0]) == [False, False, True]
    assert [remark[:6] for remark in conclusion.remarks] == ["seed 2"]


def test_a_member_that_diverges_ends_no_study(make_experiment: MakeExperiment, job: JobContext) -> None:
    recipe = make_experiment(size=16).recipe("bn_mlp", validate_every=100, learning_rate=1e30, schedule="constant")
    rows = train_members(job, recipe, members=1, mirrored=False)["accuracy"]
    assert all(math.isnan(float(row["test_top1"] or 0)) for row in rows)
    assert len(rows) == 2 * len(CROPS)


def test_members_differ_and_are_averaged(make_experiment: MakeExperiment, job: JobContext) -> None:
    recipe = make_experiment(size=16).recipe("bn_mlp", validate_every=100, dropout=0.0)
    rows = train_members(job, recipe, members=2, mirrored=False)["accuracy"]
    assert [(row["arm"], row["member"], row["crops"]) for row in rows] == [
        *[(ONE, member, number) for member in (0, 1) for number in CROPS],
        *[(ALL, None, number) for number in CROPS],
    ]
    found = []
    for member in (0, 1):
        trained = train(replace(job, folder=job.folder / f"again{member}", seed=1000 + member), recipe)
        trained.recalibrate()
        network = trained.context.network
        classifier = Classifier(network, card_of(trained.context))
        photos = trained.context.dataset.in_split("test")
        found += classify([classifier], photos.paths, workers=0)[0]
    targets = photos.class_indices(trained.context.dataset.classes)
    assert not np.allclose(*found)
    for member, one in enumerate(found):
        expected = (one.argmax(1) == targets).mean()
        assert where(rows, member=member, crops=1)[0]["test_top1"] == pytest.approx(expected)
    together = (np.mean(found, 0).argmax(1) == targets).mean()
    assert where(rows, arm=ALL, crops=1)[0]["test_top1"] == pytest.approx(together)
