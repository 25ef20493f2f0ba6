from pathlib import Path

import pytest
import torch

from bnlab.errors import OutOfMemoryError, RunError
from bnlab.nets import build
from bnlab.recipe import Recipe
from bnlab.runs import Run
from bnlab.training.checkpoint import load_state, read_state, save_state
from bnlab.training.ema import EMA
from bnlab.training.optimizer import make_optimizer
from bnlab.training.schedule import Plan
from bnlab.training.state import TrainState


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run folder with nothing but a list."""
    (tmp_path / "split.csv").write_text("path,class,split,sha256\n")
    return Run(tmp_path)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_state_survives(run: Run, optimizer: str) -> None:
    recipe = Recipe(network="bn_small_inception", optimizer=optimizer)
    network = build(recipe.network, classes=3)
    own_optimizer = make_optimizer(network, recipe)
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    own_optimizer.step()
    plan = Plan(steps=40, batches=6).changed(9, 30, 2)
    rows = [{"epoch": 1, "val_top1": None}]
    state_of_training = TrainState(epoch=1, batch=3, step=9, plan=plan, loss=1.5, rows=rows, best={"epoch": 1})
    ema = EMA(network, 0.9)
    with torch.no_grad():
        network.fc.bias.add_(1)
    ema.update(network, 4)
    parts = {"network": network, "optimizer": own_optimizer, "ema": ema.model}
    save_state(run, state_of_training, recipe, parts)

    other = build(recipe.network, classes=3, seed=1)
    other_optimizer = make_optimizer(other, recipe)
    other_ema = EMA(other, 0.9)
    others = {"network": other, "optimizer": other_optimizer, "ema": other_ema.model}
    assert load_state(run, recipe, others) == state_of_training
    kept, read = ema.network.state_dict(), other_ema.network.state_dict()
    assert all(torch.equal(kept[key], read[key]) for key in kept)
    assert not torch.equal(kept["fc.bias"], network.fc.bias)
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert str(own_optimizer.state_dict()) == str(other_optimizer.state_dict())


def test_without_a_checkpoint_the_state_is_new(run: Run) -> None:
    recipe = Recipe(network="bn_small_inception")
    network = build(recipe.network, classes=3)
    assert load_state(run, recipe, {"network": network}) == TrainState()


def test_another_recipe_or_a_broken_file_is_refused(run: Run) -> None:
    recipe = Recipe(network="bn_small_inception")
    network = build(recipe.network, classes=3)
    parts = {"network": network, "optimizer": make_optimizer(network, recipe)}
    save_state(run, TrainState(), recipe, parts)
    load_state(run, recipe.model_copy(update={"workers": 7}), parts)  # changes no result
    with pytest.raises(RunError, match=r"was changed after it began \(epochs, learning_rate\): change it back"):
        load_state(run, recipe.model_copy(update={"epochs": 3, "learning_rate": 1.0}), parts)
    state = torch.load(run.state, weights_only=True)
    for version in (3, 5):
        torch.save(state | {"format": version}, run.state)
        with pytest.raises(RunError, match=rf"state.pt has format {version}, and this bnlab reads format 4"):
            load_state(run, recipe, parts)
    run.state.write_bytes(run.state.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"state.pt cannot be read .*: begin a new run"):
        load_state(run, recipe, parts)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError(), RuntimeError("can't allocate memory")])
def test_a_full_memory_is_no_broken_file(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Neither when the file is read nor when its parts are restored; nobody should begin a new run for it."""
    recipe = Recipe(network="bn_mlp")
    network = build(recipe.network, classes=3)
    save_state(run, TrainState(), recipe, {"network": network})
    before = run.state.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise error

    for owner, name in ((torch, "load"), (network, "load_state_dict")):
        with (
            monkeypatch.context() as patch,
            pytest.raises(OutOfMemoryError, match=r"state.pt was read: .*resume again"),
        ):
            patch.setattr(owner, name, full)
            load_state(run, recipe, {"network": network})
    assert run.state.read_bytes() == before


def test_a_disk_that_does_not_answer_is_no_broken_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    run.state.write_bytes(b"x")
    monkeypatch.setattr(torch, "load", silent)
    with pytest.raises(RunError, match=r"cannot be read \(.*Input/output error\): make the file readable"):
        read_state(run)


def test_a_changed_split_or_a_lost_state_is_refused(run: Run) -> None:
    """Otherwise epochs would be validated on other photos, or a finished classifier would be overwritten."""
    recipe = Recipe(network="bn_small_inception")
    network = build(recipe.network, classes=3)
    parts = {"network": network, "optimizer": make_optimizer(network, recipe)}
    save_state(run, TrainState(), recipe, parts)
    run.split.write_text("path,class,split,sha256\na.jpg,a,val,\n")
    with pytest.raises(RunError, match=r"split.csv was changed after the run began: change it back"):
        load_state(run, recipe, parts)
    run.state.unlink()
    run.last.write_bytes(b"hours of work")
    with pytest.raises(
        RunError,
        match=r"has lost its state.pt, which a resume needs: begin a new run from its weights: bnlab train DATA --init",
    ):
        load_state(run, recipe, parts)
