from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bnlab.lab import trained_network as module
from bnlab.lab.experiment import Experiment
from bnlab.lab.measurements import JobContext
from bnlab.lab.trained_network import Probe, preserving_state, train, use_batch_statistics
from bnlab.nets import build
from bnlab.norm import BatchNorm2d
from bnlab.norm.layers import StatisticsMode
from bnlab.recipe import Recipe
from bnlab.training.build import TrainingContext

MakeBench = Callable[..., Experiment]


class Looker(Probe):
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
def recipe(make_experiment: MakeBench) -> Recipe:
    return make_experiment().recipe("bn_small_inception", validate_every=1)


def test_a_network_is_trained_judged_and_looked_at(job: JobContext, recipe: Recipe) -> None:
    told: list[int] = []
    trained = train(replace(job, report_steps=told.append), recipe, probe=Looker())
    assert sum(told) == 6
    assert [row["step"] for row in trained.results["before"]] == list(range(6))
    assert trained.results["after"][0]["weight"] == trained.results["before"][1]["weight"]
    assert trained.results["after"][0]["weight"] != trained.results["before"][0]["weight"]
    rows = trained.results["accuracy"]
    assert rows[-1]["step"] == 6
    assert not trained.diverged
    test = trained.evaluation("test")
    assert rows[-1]["n_test"] == test.n == len(trained.dataset.in_split("test"))
    recalibrated = trained.evaluation("test", "recalibrated", images=24)
    assert rows[-1]["test_top1"] == pytest.approx(recalibrated.top1, abs=1e-9)
    assert rows[-1]["test_loss"] == pytest.approx(recalibrated.loss, rel=1e-4)
    assert rows[-1]["val_top1"] == pytest.approx(trained.evaluation("val", "recalibrated", images=24).top1)


def test_looking_on_changes_nothing(job: JobContext, recipe: Recipe, tmp_path: Path) -> None:
    plain = train(replace(job, folder=tmp_path / "a"), recipe)
    looked = train(replace(job, folder=tmp_path / "b"), recipe, probe=Looker())
    assert plain.results["accuracy"] == looked.results["accuracy"]
    for a, b in zip(
        plain.context.network.state_dict().values(), looked.context.network.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


def test_an_interrupted_training_goes_on_to_the_same_numbers(
    job: JobContext, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(replace(job, folder=tmp_path / "whole"), recipe, probe=Looker())
    monkeypatch.setattr(module, "_WORTH_SAVING", 0.0)
    with pytest.raises(KeyboardInterrupt):
        train(job, recipe, probe=Looker(stop_at=4))
    told: list[int] = []
    halves = train(replace(job, report_steps=told.append), recipe, probe=Looker())
    assert 0 < told[0] <= 4  # what was saved need not be made again
    assert sum(told) == 6
    assert halves.results == whole.results


def test_the_seed_of_the_place_rules(job: JobContext, recipe: Recipe, tmp_path: Path) -> None:
    first = train(replace(job, folder=tmp_path / "a"), recipe.model_copy(update={"seed": 5}), probe=Looker())
    other = train(replace(job, folder=tmp_path / "b", seed=1), recipe, probe=Looker())
    assert first.context.recipe.seed == 0
    assert first.results["before"][0] != other.results["before"][0]


def test_a_training_that_diverges_counts_as_guessing(job: JobContext, recipe: Recipe) -> None:
    wild = recipe.model_copy(
        update={"network": "small_inception", "learning_rate": 1e12, "schedule": "constant", "steps": 20}
    )
    trained = train(job, wild)
    assert trained.diverged
    last = trained.results["accuracy"][-1]
    assert (last["step"], last["guess"]) == (20, trained.majority_baseline)
    assert last["test_top1"] == last["val_top1"] == trained.majority_baseline
    assert 0 < last["diverged_at"] < 20
    steps = [row["step"] for row in trained.results["accuracy"]]
    assert steps == sorted(set(steps))
    assert all(row["diverged_at"] is None for row in trained.results["accuracy"][:-1])
    assert len(steps) == -(-20 // trained.context.loader.batches)  # each epoch is judged
    assert set(last) == set(train(replace(job, folder=job.folder / "b"), recipe).results["accuracy"][0])


def test_a_network_of_ones_own_is_trained(job: JobContext, recipe: Recipe) -> None:
    class Own(BatchNorm2d):
        pass

    def make(recipe: Recipe, classes: int) -> Any:
        return build(recipe.network, classes=classes, width=recipe.width, norm=Own, seed=recipe.seed)

    trained = train(job, recipe, make=make)
    assert {type(layer) for layer in trained.context.network.modules() if isinstance(layer, StatisticsMode)} == {Own}


def test_whatever_is_done_is_undone() -> None:
    network = build("bn_small_inception", classes=3, width=0.25)
    network.stem.eval() if hasattr(network, "stem") else None
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    flags = [module.training for module in network.modules()]
    with pytest.raises(KeyError), preserving_state(network):
        network.eval()
        use_batch_statistics(network)
        assert {layer.statistics for layer in network.modules() if isinstance(layer, StatisticsMode)} == {"batch"}
        with torch.no_grad():
            for tensor in network.state_dict().values():
                tensor.add_(1)
        raise KeyError
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert flags == [module.training for module in network.modules()]
    assert {layer.statistics for layer in network.modules() if isinstance(layer, StatisticsMode)} == {"running"}
