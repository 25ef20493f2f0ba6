"""Options without effect: the rules by which one changes nothing, and the sentences that say so.

An option has an effect, or a sentence says that it has none; but only of what the user set. The rules here need only
the recipe. Those that need the network or the photos are in training/no_effect.py.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Generic, NamedTuple, TypeVar

from bnlab.recipe import Recipe

T = TypeVar("T")


class Rule(NamedTuple, Generic[T]):
    """Keys that change nothing in some situations."""

    keys: str
    """separated by spaces; a message shows them as they are written here, such as norm=sync"""
    why: str
    """why they change nothing there"""
    applies: Callable[[T], bool]
    """whether the situation is one of those"""


def sentences(rules: Iterable[Rule[T]], situation: T, own: Collection[str]) -> dict[str, str]:
    """For each key in `own` that changes nothing in this situation a sentence, by the first rule that says so."""
    found: dict[str, str] = {}
    for rule in rules:
        named = {word.partition("=")[0]: word for word in rule.keys.split()}
        concerned = [key for key in named if key in own and key not in found]
        if concerned and rule.applies(situation):
            found |= {key: f"{named[key]} has no effect: {rule.why}" for key in concerned}
    return found


def turned_on(recipe: Recipe, own: Iterable[str]) -> list[str]:
    """The keys without those whose value turns something off, such as patience 0: that needs no effect."""
    return [key for key in own if key in _SEEDS or getattr(recipe, key) not in (None, False, 0, "none")]


_SEEDS = ("seed", "split_seed")  # whose 0 is as good as another
RECIPE_RULES: tuple[Rule[Recipe], ...] = (
    Rule("epochs steps plan", "time decides how long the training is", lambda r: r.time is not None),
    Rule(
        "epochs steps validate_every",
        "plan decides how long the training is and when it validates",
        lambda r: bool(r.plan) and r.time is None,
    ),
    Rule("epochs", "steps decides how long the training is", lambda r: r.steps > 0),
    Rule("momentum", "it is for optimizer sgd", lambda r: r.optimizer != "sgd"),
    Rule("warmup", "it is for schedule one-cycle", lambda r: r.schedule != "one-cycle"),
    Rule("step_every step_factor", "it is for schedule step", lambda r: r.schedule != "step"),
    Rule("decay_factor decay_epochs", "it is for schedule exponential", lambda r: r.schedule != "exponential"),
    Rule("decay_epochs", "decay_factor 1 is no decay", lambda r: r.decay_factor == 1),
    Rule("auxiliary_weight", "it is for auxiliary true", lambda r: not r.auxiliary),
    Rule("crop_fraction", "it is for resize crop", lambda r: r.resize != "crop"),
    Rule("initialisation lsuv_init", "it is for a training without init", lambda r: r.init is not None),
    Rule("cache_gigabytes", "cache is none", lambda r: r.cache == "none"),
    Rule("conv_bias", "with placement after, all convolutions have biases", lambda r: r.placement == "after"),
    Rule("backbone_lr_factor freeze_bn", "the backbone is frozen", lambda r: r.freeze == "backbone"),
    Rule("auxiliary auxiliary_weight", "the backbone, which they train, is frozen", lambda r: r.freeze == "backbone"),
)
