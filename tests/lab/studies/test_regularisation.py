import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bnlab.data.split_csv import read_split_csv
from bnlab.errors import UsageError
from bnlab.lab.experiment import WITH_BN, WITHOUT_BN, check_options
from bnlab.lab.measurements import JobContext
from bnlab.lab.records import Results
from bnlab.lab.studies import regularisation
from bnlab.lab.studies.regularisation import (
    BATCHES,
    DROPOUT,
    EQUAL,
    KINDS,
    RENORMALISED,
    Renormalisation,
    arm,
    conclude,
    fewer,
)
from bnlab.lab.verdict import Verdict
from bnlab.norm import BatchNorm1d, BatchNorm2d
from tests.lab.studies.helpers import MakeExperiment, draw, has_no_number


def planted(test: dict[str, float], *, dropout_gains: float = 0.0, scatter: float = 0.0) -> Results:
    """Networks that know all of train, and so much of test; at the usual batch dropout gains so many points."""
    gaps, accuracies = [], []
    for kind in KINDS:
        for dropout in (0.0, DROPOUT):
            for batch in BATCHES:
                for seed in range(3):
                    if kind == RENORMALISED and dropout:
                        continue
                    top1 = test[kind] + dropout_gains * (dropout > 0) / 100 + scatter * (seed - 1) * (kind == WITH_BN)
                    label = {"arm": arm(kind, batch, dropout), "learning_rate": EQUAL, "chosen": 1, "seed": seed}
                    gaps.append(
                        label
                        | {"kind": kind, "batch": batch, "dropout": dropout, "n_test": 500, "guess": 0.1}
                        | {"train_top1": 1.0, "test_top1": top1, "train_loss": 0.0, "test_loss": 1 - top1}
                    )
                    accuracies.append(label | {"diverged_at": None})
    return {"gap": gaps, "accuracy": accuracies}


def test_it_holds_where_bn_narrows_the_gap_and_its_noise_is_why() -> None:
    assert conclude(planted({WITHOUT_BN: 0.8, WITH_BN: 0.9, RENORMALISED: 0.85})).verdict is Verdict.HOLDS


@pytest.mark.parametrize(
    "test", [{WITHOUT_BN: 0.95, WITH_BN: 0.9, RENORMALISED: 0.85}, {WITHOUT_BN: 0.8, WITH_BN: 0.9, RENORMALISED: 0.95}]
)
def test_it_does_not_hold_where_the_gap_is_wider_with_bn_or_narrower_without_the_noise(test: dict[str, float]) -> None:
    assert conclude(planted(test)).verdict is Verdict.DOES_NOT_HOLD


def test_it_does_not_hold_where_bn_still_needs_dropout() -> None:
    results = planted({WITHOUT_BN: 0.8, WITH_BN: 0.9, RENORMALISED: 0.85}, dropout_gains=5)
    assert conclude(results).verdict is Verdict.DOES_NOT_HOLD


def test_it_is_not_shown_where_seeds_disagree() -> None:
    results = planted({WITHOUT_BN: 0.8, WITH_BN: 0.85, RENORMALISED: 0.82}, scatter=0.1)
    assert conclude(results).verdict is Verdict.NOT_SHOWN


def nan_seeds(results: Results) -> list[list[bool]]:
    return [has_no_number(evidence) for evidence in conclude(results).evidence]


def test_a_network_that_learnt_nothing_of_train_has_no_gap() -> None:
    results = planted({WITHOUT_BN: 0.8, WITH_BN: 0.9, RENORMALISED: 0.85})
    for row in results["gap"]:
        if row["seed"] == 1 and row["kind"] == WITHOUT_BN:
            row |= {"train_top1": 0.15, "test_top1": 0.1, "test_loss": math.nan}
    conclusion = conclude(results)
    no, second = [False] * 3, [False, True, False]
    assert nan_seeds(results) == [second, second, no, no, no, no, no, second, no]
    assert conclusion.verdict is Verdict.NOT_SHOWN
    assert f"{arm(WITHOUT_BN, 32)}: learnt nothing with 1 seed, which show nothing" in conclusion.remarks
    assert all(map(math.isfinite, conclusion.plots["gap in loss"].series[0].y))  # of the seeds that have one
    for row in results["gap"]:
        row["train_top1"] = 0.15
    draw(conclude(results))


def test_pairs_are_of_one_seed() -> None:
    results = planted({WITHOUT_BN: 0.8, WITH_BN: 0.9, RENORMALISED: 0.85})
    gone = {"kind": RENORMALISED, "batch": BATCHES[0], "seed": 0}
    results["gap"] = [row for row in results["gap"] if not gone.items() <= row.items()]
    assert nan_seeds(results)[2] == [True, False, False]


def test_fewer_takes_of_train_alone_and_of_each_class_alike(make_experiment: MakeExperiment, tmp_path: Path) -> None:
    experiment = make_experiment()
    job = JobContext(split=experiment.splits.for_seed(0), folder=tmp_path, device="cpu", seed=0)
    all_photos, kept = read_split_csv(job.split), read_split_csv(fewer(job, 9))
    splits = {side: [p.label for p in kept if p.split == side] for side in ("train", "val", "test")}
    assert sorted(splits["train"]) == ["disc"] * 3 + ["ring"] * 3 + ["stripes"] * 3
    for side in ("val", "test"):
        assert len(splits[side]) == sum(photo.split == side for photo in all_photos)
    assert fewer(replace(job, split=job.split), 10_000) != fewer(job, 9)


@pytest.mark.parametrize(("most", "kept"), [(1, 3), (5, 3), (8, 6)])
def test_fewer_are_at_most_so_many_but_one_of_each_class(job: JobContext, most: int, kept: int) -> None:
    train = [photo.label for photo in read_split_csv(fewer(job, most)) if photo.split == "train"]
    assert len(train) == kept
    assert len(set(train)) == 3


def test_the_batch_is_its_own() -> None:
    with pytest.raises(UsageError, match="batch_size"):
        check_options("regularisation", {"batch_size": 16}, regularisation.STUDY.own_keys)


def test_a_training_that_diverged_is_guessing_without_a_gap(make_experiment: MakeExperiment, tmp_path: Path) -> None:
    experiment = make_experiment(learning_rate=1e30)
    job = JobContext(split=experiment.splits.for_seed(0), folder=tmp_path, device="cpu", seed=0)
    results = regularisation.train_for_gap(job, experiment.recipe("mlp", activation="relu"), WITHOUT_BN, 20)
    assert results["accuracy"][-1]["diverged_at"] is not None
    (row,) = results["gap"]
    assert row["train_top1"] == row["test_top1"] == row["guess"]
    assert row["train_loss"] == row["test_loss"] == math.log(3)


def test_from_photos_to_plots(make_experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regularisation, "RATES", (EQUAL,))
    results = regularisation.measure(make_experiment(steps=3, seeds=1))
    gaps = results["gap"]
    assert len(gaps) == len(BATCHES) * 5
    assert all(row["n_train"] + row["n_test"] < 72 for row in gaps)
    conclusion = conclude(results)
    assert len(conclusion.plots) == 3
    draw(conclusion)


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 2, 2)])
def test_renormalisation_gives_what_the_recorded_statistics_give(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = Renormalisation(3, momentum=0.25)
    torch.nn.init.uniform_(layer.weight)
    torch.nn.init.uniform_(layer.bias)
    layer(torch.randn(shape) * 3 + 1)
    inputs = torch.randn(shape)
    known = layer.eval()(inputs)
    assert torch.allclose(layer.train()(inputs), known, atol=1e-5)
    assert not torch.allclose(layer.eval()(inputs), known, atol=1e-2)  # the batch has been recorded since


@pytest.mark.parametrize("relu", [False, True])
def test_its_gradients_are_those_of_ioffes_formula(relu: bool) -> None:
    torch.manual_seed(0)
    layer = Renormalisation(3).double()
    layer.weight.data.uniform_(0.5, 2)
    layer(torch.randn(8, 3, dtype=torch.float64))
    mean, sd = layer.running_mean.clone(), (layer.running_var + layer.eps).sqrt()
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    towards = torch.randn(8, 3, dtype=torch.float64)

    batch_sd = (x.var(0, unbiased=False) + layer.eps).sqrt()
    r, d = (batch_sd / sd).detach(), ((x.mean(0) - mean) / sd).detach()
    y = ((x - x.mean(0)) / batch_sd * r + d) * layer.weight + layer.bias
    expected = torch.autograd.grad(((y.relu() if relu else y) * towards).sum(), [x, layer.weight, layer.bias])

    found = torch.autograd.grad((layer(x, relu=relu) * towards).sum(), [x, layer.weight, layer.bias])
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert found[0].sum(0).abs().max() < 1e-6  # the batch's mean is a function of x: no shift of it has a gradient


def test_what_is_recorded_is_the_average_of_the_first_batches_then_a_moving_one() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(5, 2) for _ in range(3)]
    layer = Renormalisation(2, momentum=0.4)
    first = layer(batches[0])
    plain = BatchNorm1d(2)
    assert torch.equal(first, plain(batches[0]))
    layer(batches[1])
    assert torch.allclose(layer.running_mean, (batches[0].mean(0) + batches[1].mean(0)) / 2, atol=1e-6)
    before = layer.running_var.clone()
    layer(batches[2])
    assert torch.allclose(layer.running_var, 0.6 * before + 0.4 * batches[2].var(0), atol=1e-6)


def test_by_its_own_batch_in_evaluation_it_is_bn() -> None:
    torch.manual_seed(0)
    layer = Renormalisation(3)
    images = torch.randn(4, 3, 2, 2)
    layer(images * 5)
    layer.eval().statistics = "batch"
    before = layer.running_mean.clone()
    assert torch.equal(layer(images), BatchNorm2d(3).train()(images))
    assert torch.equal(layer.running_mean, before)
