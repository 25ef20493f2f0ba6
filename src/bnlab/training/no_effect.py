"""Recipe keys that change nothing in a training with this network and these photos."""

from dataclasses import dataclass

from bnlab.config import Settings
from bnlab.nets.blocks import is_normalised
from bnlab.nets.network import TableNetwork
from bnlab.no_effect import RECIPE_RULES, Rule, sentences, turned_on
from bnlab.norm.layers import StatisticsMode, batch_norm_layers
from bnlab.recipe import Recipe
from bnlab.training.schedule import Plan


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What decides whether a key of the recipe has an effect."""

    recipe: Recipe
    network: TableNetwork
    batch: int | None = None  # photos in the largest batch; None if it is not known
    plan: Plan | None = None  # None if the number of steps is not known
    own_val: bool = False  # whether the photos have a val split already


def _norm(situation: Situation) -> str:
    return str(situation.recipe.norm).partition(":")[0]


def _ghost_size(situation: Situation) -> int:
    kind, _, size = str(situation.recipe.norm).partition(":")
    return int(size) if kind == "ghost" else 0


def _one_size(situation: Situation) -> bool:
    """Whether training could have no smaller photos than `size`, although start_size asks for them."""
    recipe, plan = situation.recipe, situation.plan or Plan(steps=1000, batches=1)
    return recipe.start_size < 1 and plan.size(recipe, 0) == recipe.size


def _can_stop(recipe: Recipe, plan: Plan) -> bool:
    """Whether a validation before the last epoch can come `patience` epochs after the first one."""
    validated = [epoch for epoch in range(plan.epochs - 1) if plan.validates(epoch)]
    return bool(validated) and validated[-1] - validated[0] >= recipe.patience


RULES: tuple[Rule[Situation], ...] = (
    Rule("val split_seed", "these photos already have a val split", lambda s: s.own_val),
    Rule("auxiliary auxiliary_weight", "the network has no auxiliary heads", lambda s: not s.network.heads),
    Rule(
        "norm_eps norm_momentum conv_bias placement recalibration_images bn_monitor",
        "the network is not normalised",
        lambda s: not is_normalised(s.network),
    ),
    Rule("norm=sync", "one process trains, where it is the same as norm=batch", lambda s: _norm(s) == "sync"),
    Rule(
        "norm=ghost",
        "no batch has more photos than a ghost batch, so that it is the same as norm=batch",
        lambda s: s.batch is not None and s.batch <= _ghost_size(s),
    ),
    Rule("bn_monitor", "it is for batch normalisation", lambda s: not [*batch_norm_layers(s.network)]),
    Rule(
        "norm_momentum recalibration_images",
        "no layer has statistics that training moves",
        lambda s: not any(isinstance(m, StatisticsMode) and not m.frozen for m in s.network.modules()),
    ),
    Rule("start_size", "all epochs have photos of the same size", _one_size),
    Rule(
        "schedule step_every step_factor",
        "the training has no more steps than step_every",
        lambda s: s.recipe.schedule == "step" and s.plan is not None and s.plan.steps <= s.recipe.step_every,
    ),
    Rule(
        "patience",
        "the training ends before it can run out",
        lambda s: s.plan is not None and not _can_stop(s.recipe, s.plan),
    ),
)


def without_effect(settings: Settings, situation: Situation) -> list[str]:
    """A sentence for each key that the user set and that changes nothing in the training."""
    own = turned_on(settings.recipe, settings.own)
    found = sentences(RECIPE_RULES, settings.recipe, own)
    found |= sentences(RULES, situation, [key for key in own if key not in found])
    return list(found.values())
