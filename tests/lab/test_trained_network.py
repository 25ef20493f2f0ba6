from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bnlab.data.dataset import open_recorded_data
from bnlab.data.split_csv import read_split_csv
from bnlab.lab import trained_network as module
from bnlab.lab.experiment import Experiment
from bnlab.lab.measurements import JobContext
from bnlab.lab.splits import open_study_splits
from bnlab.lab.trained_network import Probe, TrainedNetwork, baseline_row, majority_baseline, train
from bnlab.nets import build
from bnlab.norm import BatchNorm2d
from bnlab.norm.layers import StatisticsMode
from bnlab.progress import NullProgress
from bnlab.recipe import Recipe
from bnlab.training.build import TrainingContext
from tests.conftest import write_photos
from tests.lab.conftest import tiny_experiment

MakeExperiment = Callable[..., Experiment]


class Recorder(Probe):
    """Writes each step's number and a weight before and after it."""

    def __init__(self, stop_at: int = -1) -> None:
        super().__init__()
        self.stop_at = stop_at

    def before(self, step: int, context: TrainingContext) -> None:
        if step == self.stop_at:
            raise KeyboardInterrupt
        self.write("before", {"step": step, "weight": float(context.network.fc.weight.detach().sum())})

    def after(self, step: int, context: TrainingContext) -> None:
        self.write("after", {"step": step, "weight": float(context.network.fc.weight.detach().sum())})


@pytest.fixture
def recipe(make_experiment: MakeExperiment) -> Recipe:
    return make_experiment().recipe("bn_small_inception", validate_every=1)


@pytest.fixture(scope="module")
def probed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainedNetwork, list[int]]:
    """An uninterrupted training with a probe, of a job like `job` by a recipe like `recipe`, and its reported steps."""
    folder, reported = tmp_path_factory.mktemp("probed"), list[int]()
    experiment = tiny_experiment(photos, folder)
    recipe = experiment.recipe("bn_small_inception", validate_every=1)
    split = experiment.splits.for_seed(0)
    job = JobContext(split=split, folder=folder / "job", device="cpu", seed=0, report_steps=reported.append)
    return train(job, recipe.model_copy(update={"seed": 5}), probe=Recorder()), reported


def test_a_network_is_trained_probed_and_validated(probed: tuple[TrainedNetwork, list[int]]) -> None:
    trained, reported = probed
    assert sum(reported) == 6
    assert [row["step"] for row in trained.results["before"]] == list(range(6))
    assert trained.results["after"][0]["weight"] == trained.results["before"][1]["weight"]
    assert trained.results["after"][0]["weight"] != trained.results["before"][0]["weight"]
    rows = trained.results["accuracy"]
    assert rows[-1]["step"] == 6
    assert not trained.diverged
    test = trained.evaluation("test")
    assert rows[-1]["n_test"] == test.n == len(trained.context.dataset.in_split("test"))
    recalibrated = trained.evaluation("test", "recalibrated", images=24)
    assert rows[-1]["test_top1"] == pytest.approx(recalibrated.top1, abs=1e-9)
    assert rows[-1]["test_loss"] == pytest.approx(recalibrated.loss, rel=1e-4)
    assert rows[-1]["val_top1"] == pytest.approx(trained.evaluation("val", "recalibrated", images=24).top1)


def test_a_probe_changes_nothing(job: JobContext, recipe: Recipe, probed: tuple[TrainedNetwork, list[int]]) -> None:
    plain = train(job, recipe)
    assert plain.results["accuracy"] == probed[0].results["accuracy"]
    tensors = (trained.context.network.state_dict().values() for trained in (plain, probed[0]))
    assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


def test_an_interrupted_training_resumes_to_the_same_numbers(
    job: JobContext, recipe: Recipe, probed: tuple[TrainedNetwork, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WORTH_SAVING", 0.0)
    with pytest.raises(KeyboardInterrupt):
        train(job, recipe, probe=Recorder(stop_at=4))
    reported: list[int] = []
    resumed = train(replace(job, report_steps=reported.append), recipe, probe=Recorder())
    assert 0 < reported[0] <= 4  # the steps of the checkpoint
    assert sum(reported) == 6
    assert resumed.results == probed[0].results


def test_the_seed_of_the_job_takes_the_place_of_the_recipes(
    job: JobContext, recipe: Recipe, probed: tuple[TrainedNetwork, list[int]]
) -> None:
    assert probed[0].context.recipe.seed == 0  # its recipe has 5
    other = train(replace(job, seed=1), recipe.model_copy(update={"steps": 1}), probe=Recorder())
    assert probed[0].results["before"][0] != other.results["before"][0]


def test_a_training_that_diverges_counts_as_the_majority_baseline(job: JobContext, recipe: Recipe) -> None:
    wild = recipe.model_copy(
        update={"network": "small_inception", "learning_rate": 1e12, "schedule": "constant", "steps": 20}
    )
    trained = train(job, wild)
    assert trained.diverged
    last = trained.results["accuracy"][-1]
    assert (last["step"], last["guess"]) == (20, majority_baseline(trained.context.dataset))
    assert last["test_top1"] == last["val_top1"] == majority_baseline(trained.context.dataset)
    assert 0 < last["diverged_at"] < 20
    steps = [row["step"] for row in trained.results["accuracy"]]
    assert steps == sorted(set(steps))
    assert all(row["diverged_at"] is None for row in trained.results["accuracy"][:-1])
    assert len(steps) == -(-20 // trained.context.loader.batches)  # one for each epoch
    assert set(last) == set(train(replace(job, folder=job.folder / "b"), recipe).results["accuracy"][0])


def test_a_network_of_ones_own_is_trained(job: JobContext, recipe: Recipe) -> None:
    class Own(BatchNorm2d):
        pass

    def make(recipe: Recipe, classes: int) -> Any:
        return build(recipe.network, classes=classes, width=recipe.width, norm=Own, seed=recipe.seed)

    trained = train(job, recipe, make=make)
    assert {type(layer) for layer in trained.context.network.modules() if isinstance(layer, StatisticsMode)} == {Own}


def test_the_majority_baseline_names_the_most_common_class_of_test(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", each=20)
    write_photos(photos, each=60, classes=("ring",), first=20)
    splits = open_study_splits(photos, quick=True, min_photos=10, folder=tmp_path / "s", progress=NullProgress())
    split = splits.for_seed(0)
    test = [photo.label for photo in read_split_csv(split) if photo.split == "test"]
    dataset = open_recorded_data(split)
    baseline = majority_baseline(dataset)
    assert baseline == pytest.approx(test.count("ring") / len(test))
    assert baseline > 0.5
    row = baseline_row(7, dataset)
    assert (row["step"], row["n_test"]) == (7, len(test))
    assert row["val_top1"] == row["test_top1"] == row["guess"] == baseline
