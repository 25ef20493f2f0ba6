from pathlib import Path

import pytest
import torch

from bnlab.config import Recipe
from bnlab.errors import RunError
from bnlab.nets import build
from bnlab.training.checkpoint import Position, load_state, save_state
from bnlab.training.loop import make_optimizer


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_state_survives(tmp_path: Path, optimizer: str) -> None:
    recipe = Recipe(network="bn_small_inception", optimizer=optimizer)
    network = build(recipe.network, classes=3)
    stepper = make_optimizer(network, recipe)
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    stepper.step()
    position = Position(epoch=1, batch=3, step=9, loss=1.5, rows=[{"epoch": 1, "val_top1": 0.5}], best={"epoch": 1})
    save_state(tmp_path / "state.pt", position, network, stepper, recipe)

    other = build(recipe.network, classes=3, seed=1)
    other_stepper = make_optimizer(other, recipe)
    assert load_state(tmp_path / "state.pt", other, other_stepper, recipe) == position
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert str(stepper.state_dict()) == str(other_stepper.state_dict())


def test_nothing_saved_is_the_beginning(tmp_path: Path) -> None:
    recipe = Recipe(network="bn_small_inception")
    network = build(recipe.network, classes=3)
    assert load_state(tmp_path / "state.pt", network, make_optimizer(network, recipe), recipe) == Position()


def test_another_recipe_or_a_broken_file_is_refused(tmp_path: Path) -> None:
    recipe = Recipe(network="bn_small_inception")
    network = build(recipe.network, classes=3)
    optimizer = make_optimizer(network, recipe)
    path = tmp_path / "state.pt"
    save_state(path, Position(), network, optimizer, recipe)
    load_state(path, network, optimizer, recipe.model_copy(update={"workers": 7}))  # changes no result
    with pytest.raises(RunError, match=r"was changed after it began \(epochs, learning_rate\): change it back"):
        load_state(path, network, optimizer, recipe.model_copy(update={"epochs": 3, "learning_rate": 1.0}))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"state.pt cannot be read .*: begin a new run"):
        load_state(path, network, optimizer, recipe)
