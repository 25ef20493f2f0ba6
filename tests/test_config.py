from pathlib import Path

import pytest
import yaml

from bnlab.config import (
    YOURS,
    load_settings,
    parse_assignments,
    read_recipe_file,
    recipe_names,
    to_yaml,
    with_changes,
)
from bnlab.errors import RecipeError
from bnlab.recipe import MACHINE_KEYS, Recipe

RECIPES = Path(__file__).parents[1] / "src" / "bnlab" / "recipes"


def refusal(recipe: str | Path = "default", **options: object) -> str:
    with pytest.raises(RecipeError) as error:
        load_settings(recipe, options)
    return str(error.value)


def test_shipped_recipes_are_valid() -> None:
    of_the_paper = ["bn-baseline", "bn-x30", "bn-x5", "bn-x5-sigmoid", "inception"]
    assert recipe_names() == sorted(["classic", "default", "digits", *of_the_paper])
    for name in recipe_names():
        load_settings(name)


def test_default_is_the_defaults() -> None:
    settings = load_settings()
    assert settings.recipe == Recipe()
    assert settings.origin == {}


def test_classic_is_the_recipe_of_the_tutorial() -> None:
    """Each key that affects a result is in the file, so that a better default never changes it."""
    given = yaml.safe_load((RECIPES / "classic.yaml").read_text())
    of_the_network = {"variant", "norm", "activation", "initialisation"}
    of_fine_tuning = {"init", "backbone_lr_factor", "freeze", "freeze_bn"}
    assert (
        set(Recipe.model_fields) - set(given)
        == MACHINE_KEYS | {"val", "split_seed", "seed"} | of_the_network | of_fine_tuning
    )
    recipe = load_settings("classic").recipe
    assert (recipe.network, recipe.auxiliary, recipe.auxiliary_weight, recipe.dropout) == (
        "bn_googlenet",
        True,
        0.3,
        0.4,
    )
    assert (recipe.optimizer, recipe.learning_rate, recipe.weight_decay) == ("adam", 0.0015, 0.0)
    assert (recipe.schedule, recipe.step_every, recipe.step_factor) == ("step", 1500, 0.1)
    assert (recipe.batch_size, recipe.epochs, recipe.size, recipe.resize) == (32, 30, 224, "squash")
    assert recipe.mean == recipe.std == (0.5, 0.5, 0.5)
    assert (recipe.crop_area, recipe.crop_aspect, recipe.flip) == ((0.08, 1.0), (3 / 4, 4 / 3), 0.5)
    assert recipe.label_smoothing == 0


def test_the_papers_recipes_are_its_table() -> None:
    """Section 4.2: the learning rates, the batch, and the seven changes, each in its direction."""
    names = ("inception", "bn-baseline", "bn-x5", "bn-x30", "bn-x5-sigmoid")
    recipes = {name: load_settings(name).recipe for name in names}
    assert [recipes[name].learning_rate for name in names] == [0.0015, 0.0015, 0.0075, 0.045, 0.0075]
    assert [recipes[name].network for name in names] == ["inception"] + ["bn_inception"] * 4
    assert [recipes[name].activation for name in names] == [None] * 4 + ["sigmoid"]
    assert {recipes[name].batch_size for name in names} == {32}
    same = {"network", "learning_rate", "activation"}
    dumped = {name: recipes[name].model_dump(exclude=same) for name in names}
    assert dumped["inception"] == dumped["bn-baseline"]
    assert dumped["bn-x5"] == dumped["bn-x30"] == dumped["bn-x5-sigmoid"]
    before, after = recipes["bn-baseline"], recipes["bn-x5"]
    changed = {key for key, value in dumped["bn-x5"].items() if value != dumped["bn-baseline"][key]}
    assert changed == {"dropout", "weight_decay", "decay_epochs", "local_response", "shuffle", "color_jitter"}
    assert (before.dropout, after.dropout) == (0.4, 0.0)
    assert after.weight_decay == pytest.approx(before.weight_decay / 5)
    assert after.decay_epochs == pytest.approx(before.decay_epochs / 6)
    assert (before.local_response, after.local_response) == (True, False)
    assert (before.shuffle, after.shuffle) == ("batches", "photos")
    assert after.color_jitter < before.color_jitter


def test_options_go_before_the_recipe() -> None:
    settings = load_settings("classic", {"epochs": 2})
    assert (settings.recipe.epochs, settings.recipe.size) == (2, 224)
    assert settings.own == {"epochs"}
    assert settings.origin["learning_rate"] == "classic"


def test_yaml_keeps_every_value_and_its_origin(tmp_path: Path) -> None:
    settings = load_settings("default", {"epochs": 2, "mean": [0.1, 0.2, 0.3], "init": "a: b#'.safetensors"})
    text = to_yaml(settings)
    (tmp_path / "recipe.yaml").write_text(text)
    assert read_recipe_file(tmp_path / "recipe.yaml").recipe == settings.recipe
    lines = {line.partition(":")[0]: line for line in text.splitlines()}
    assert lines["epochs"].startswith("epochs: 2  # (yours) ")
    assert str(Recipe.model_fields["epochs"].description) in lines["epochs"]
    assert "(yours)" not in lines["size"]
    assert "optimizer: adam  # (classic) " in to_yaml(load_settings("classic", {"epochs": 2}))


def test_assignments_are_yaml() -> None:
    assert parse_assignments(["momentum=0.8", "mean=[0, 0, 0]", "init=null"]) == {
        "momentum": 0.8, "mean": [0, 0, 0], "init": None,
    }  # fmt: skip
    with pytest.raises(RecipeError, match=r"--set momentum is not KEY=VALUE: .*--set epochs=20"):
        parse_assignments(["momentum"])


def test_an_unknown_key_gets_the_nearest_name(tmp_path: Path) -> None:
    assert refusal(epoch=3) == "a recipe has no key 'epoch' (in the options): did you mean 'epochs'?"
    (tmp_path / "mine.yaml").write_text("learning_rat: 0.1\n")
    assert refusal(tmp_path / "mine.yaml") == (
        f"a recipe has no key 'learning_rat' (in recipe {tmp_path / 'mine.yaml'}): did you mean 'learning_rate'?"
    )


@pytest.mark.parametrize("key", ["grow_from", "trunk_rate", "judge_every"])
def test_a_key_of_an_older_version_is_unknown(tmp_path: Path, key: str) -> None:
    (tmp_path / "recipe.yaml").write_text(f"{key}: 1\n")
    with pytest.raises(RecipeError, match=f"no key '{key}'"):
        read_recipe_file(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("size", 15, "it must be greater than or equal to 16"),
        ("learning_rate", -1, "it must be greater than 0"),
        ("learning_rate", float("nan"), "it must be a finite number"),
        ("optimizer", "lamb", "it must be 'sgd', 'adam' or 'adamw'"),
        ("time", "soon", "20m"),
        ("time", "1h30", "1h30m or 90s: hours, minutes, seconds, each number with its unit"),
        ("plan", [[3, 9, 1]], "it must be as bnlab wrote it"),
        ("plan", [[0, "many", 1]], "it must be as bnlab wrote it"),
        ("mean", 0.5, "[0.485, 0.456, 0.406]"),
    ],
)
def test_a_value_out_of_range_is_named_with_the_remedy(key: str, value: object, remedy: str) -> None:
    message = refusal(**{key: value})
    assert message.startswith(f"{key} is {value!r} (in the options): ")
    assert remedy in message


def test_a_range_that_falls_is_refused() -> None:
    assert "crop_area must go from" in refusal(crop_area=[0.9, 0.2])


def test_what_is_not_a_recipe_is_refused(tmp_path: Path) -> None:
    assert refusal("clasic") == "no recipe is called 'clasic': did you mean 'classic'?"
    assert "cannot be read" in refusal(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    assert "is not a table of keys" in refusal(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    assert "is not YAML" in refusal(tmp_path / "broken.yaml")


def test_another_length_replaces_the_steps_that_a_timed_training_came_to(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("time: null\nsteps: 8\nvalidate_every: 2\nplan: [[0, 9, 1], [5, 8, 2]]\n")
    assert load_settings(file, {"workers": 1}).recipe.plan == ((0, 9, 1), (5, 8, 2))
    for option, steps in (({"time": "20m"}, 0), ({"epochs": 3}, 0), ({"steps": 100}, 100), ({"validate_every": 1}, 8)):
        settings = load_settings(file, option)
        assert (settings.recipe.plan, settings.recipe.steps) == ((), steps)
        assert settings.without_effect() == []


def test_a_recipe_file_whose_steps_are_not_those_of_its_plan_is_refused(tmp_path: Path) -> None:
    """Somebody changed one of them, and the other would decide."""
    file = tmp_path / "recipe.yaml"
    file.write_text("steps: 100\nplan: [[0, 9, 1], [5, 8, 2]]\n")
    assert refusal(file) == f"recipe {file} has 100 steps, and a plan of 8: delete its line plan, or pass steps=NUMBER"
    assert load_settings(file, {"steps": 20}).recipe.steps == 20


def test_changes_are_validated() -> None:
    settings = with_changes(load_settings(), {"workers": 3}, "init")
    assert (settings.recipe.workers, settings.origin) == (3, {"workers": "init"})
    with pytest.raises(RecipeError, match=r"workers is 999 \(in the options\): it must be less than"):
        with_changes(load_settings(), {"workers": 999}, YOURS)
