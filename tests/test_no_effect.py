from typing import Any

import pytest

from bnlab.commands.train import FIND_LR_RULES
from bnlab.config import load_settings
from bnlab.no_effect import RECIPE_RULES, Rule, sentences
from bnlab.recipe import Recipe
from bnlab.training.no_effect import RULES

# Keys that change the result, the speed or the answers of every training in which they are turned on.
ALWAYS = {
    "network", "variant", "activation", "width", "stem", "local_response", "dropout", "size", "mean", "std",
    "pre_resize", "crop_area", "crop_aspect", "flip", "color_jitter", "mixup", "cutmix", "shuffle", "batch_size",
    "accumulate", "optimizer", "weight_decay", "clip_norm", "label_smoothing", "precision", "compile", "seed", "init",
    "freeze", "device", "workers", "pixel_range", "max_megapixels",
}  # fmt: skip
# Keys that a training always uses, but not --find-lr.
IN_TRAININGS = {"time", "learning_rate", "ema", "flip_tta", "cache", "checkpoint_seconds", "resize"}


def keys_of(*tables: tuple[Rule[Any], ...]) -> set[str]:
    return {word.partition("=")[0] for rules in tables for rule in rules for word in rule.keys.split()}


def test_each_key_has_a_rule_or_always_has_an_effect() -> None:
    """A new key has to be put into one of the tables."""
    in_trainings = keys_of(RECIPE_RULES, RULES)
    everywhere = in_trainings | keys_of(FIND_LR_RULES)
    assert everywhere | ALWAYS == set(Recipe.model_fields)
    assert not everywhere & ALWAYS
    assert everywhere - in_trainings == IN_TRAININGS


RECIPES: list[tuple[dict[str, Any], list[str]]] = [
    ({"epochs": 3, "steps": 9}, ["epochs"]),
    ({"epochs": 3, "steps": 9, "time": 60}, ["epochs", "steps"]),
    ({"epochs": 3, "steps": 0}, []),
    ({"plan": [[0, 9, 1]], "epochs": 3, "validate_every": 2}, ["epochs", "validate_every"]),
    ({"plan": [[0, 9, 1]], "time": 60, "validate_every": 2}, ["plan"]),
    ({"optimizer": "adam", "momentum": 0.8}, ["momentum"]),
    ({"optimizer": "adamw", "momentum": 0.8}, ["momentum"]),
    ({"schedule": "step", "warmup": 0.3, "step_every": 9}, ["warmup"]),
    ({"step_every": 9, "step_factor": 0.2, "decay_factor": 0.9, "decay_epochs": 3}, [
        "step_every", "step_factor", "decay_factor", "decay_epochs",
    ]),
    ({"schedule": "exponential", "decay_factor": 1, "decay_epochs": 3}, ["decay_epochs"]),
    ({"auxiliary_weight": 0.2}, ["auxiliary_weight"]),
    ({"auxiliary_weight": 0.2, "auxiliary": True}, []),
    ({"auxiliary_weight": 0.2, "auxiliary": True, "init": "x", "freeze": "backbone"}, [
        "auxiliary", "auxiliary_weight",
    ]),
    ({"init": "x", "freeze": "backbone", "freeze_bn": True, "backbone_lr_factor": 0.5}, [
        "backbone_lr_factor", "freeze_bn",
    ]),
    ({"init": "x", "freeze": "stem", "freeze_bn": True, "backbone_lr_factor": 0.5}, []),
    ({"init": "x", "initialisation": "he", "lsuv_init": True}, ["initialisation", "lsuv_init"]),
    ({"resize": "squash", "crop_fraction": 0.5}, ["crop_fraction"]),
    ({"cache": "none", "cache_gigabytes": 3}, ["cache_gigabytes"]),
    ({"cache": "disk", "cache_gigabytes": 3}, []),
    ({"placement": "after", "conv_bias": True}, ["conv_bias"]),
    ({"cache": "none", "cache_gigabytes": 0, "optimizer": "adam", "momentum": 0, "conv_bias": False}, []),  # turned off
]  # fmt: skip


@pytest.mark.parametrize(("options", "keys"), RECIPES, ids=str)
def test_what_the_recipe_makes_useless_is_named(options: dict[str, Any], keys: list[str]) -> None:
    found = load_settings("default", options).without_effect()
    assert [sentence.partition(" has no effect: ")[0] for sentence in found] == keys
    assert all(len(sentence.partition(": ")[2]) > 8 for sentence in found)


@pytest.mark.parametrize("name", ["default", "classic", "digits", "inception", "bn-x5"])
def test_what_the_user_did_not_set_is_not_named(name: str) -> None:
    assert load_settings(name).without_effect() == []


def test_the_first_rule_that_applies_gives_the_reason() -> None:
    rules = (
        Rule[int]("a b=x", "one", lambda n: n > 1),
        Rule[int]("b c", "two", lambda _: True),
    )
    assert sentences(rules, 2, {"a", "b"}) == {"a": "a has no effect: one", "b": "b=x has no effect: one"}
    assert sentences(rules, 0, {"a", "b"}) == {"b": "b has no effect: two"}
