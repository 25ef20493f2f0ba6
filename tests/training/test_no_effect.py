"""Each row: options, what else decides, and the keys that are named."""

from dataclasses import replace
from typing import Any

import pytest

from bnlab.config import load_settings
from bnlab.training.build import new_network
from bnlab.training.no_effect import Situation, without_effect
from bnlab.training.schedule import Plan

PLAN: dict[str, Any] = {"plan": Plan(steps=40, batches=4)}  # ten epochs
OF_NORMS: dict[str, Any] = {
    "norm_eps": 0.1, "norm_momentum": 0.2, "conv_bias": True, "placement": "before", "recalibration_images": 9,
    "bn_monitor": True,
}  # fmt: skip
TUNED: dict[str, Any] = {"init": "x", "norm_momentum": 0.2, "recalibration_images": 9, "norm_eps": 0.1}

ROWS: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({"val": 0.2, "split_seed": 0}, {"own_val": True}, ["val", "split_seed"]),
    ({"val": 0.2, "split_seed": 0}, {}, []),
    ({"network": "bn_mlp", "auxiliary": True, "auxiliary_weight": 1}, {}, ["auxiliary", "auxiliary_weight"]),
    ({"network": "bn_googlenet", "auxiliary": True, "auxiliary_weight": 1}, {}, []),
    ({"network": "mlp", **OF_NORMS}, {}, list(OF_NORMS)),
    ({"network": "bn_mlp", **OF_NORMS}, {}, []),
    ({"network": "bn_mlp", "norm": "none", "bn_monitor": True}, {}, ["bn_monitor"]),
    ({"network": "mlp", "recalibration_images": 0, "bn_monitor": False}, {}, []),  # turned off
    ({"network": "bn_mlp", "norm": "sync"}, {}, ["norm=sync"]),
    ({"network": "bn_mlp", "norm": "batch"}, {}, []),
    ({"network": "bn_mlp", "norm": "ghost:8"}, {"batch": 8}, ["norm=ghost"]),
    ({"network": "bn_mlp", "norm": "ghost:8"}, {"batch": 9}, []),
    ({"network": "bn_mlp", "norm": "whitening:4", **OF_NORMS}, {}, ["bn_monitor"]),
    ({"network": "bn_small_inception", "freeze_bn": True, **TUNED}, {}, ["norm_momentum", "recalibration_images"]),
    ({"network": "bn_small_inception", "freeze": "backbone", **TUNED}, {}, ["norm_momentum", "recalibration_images"]),
    ({"network": "bn_small_inception", "freeze": "stem", **TUNED}, {}, []),
    ({"start_size": 0.5, "size": 32}, PLAN, ["start_size"]),
    ({"start_size": 1, "size": 32}, PLAN, []),
    ({"start_size": 0.5, "size": 64}, PLAN, []),
    ({"start_size": 0.5, "size": 64}, {"plan": Plan(steps=4, batches=4)}, ["start_size"]),  # one epoch
    ({"schedule": "step"}, PLAN, ["schedule"]),
    ({"schedule": "step", "step_every": 40, "step_factor": 0.5}, PLAN, ["schedule", "step_every", "step_factor"]),
    ({"schedule": "step", "step_every": 39}, PLAN, []),
    ({"schedule": "step"}, {}, []),  # the length is not known yet
    ({"patience": 8}, PLAN, []),  # of nine validations before the last epoch, the last one can end the training
    ({"patience": 9}, PLAN, ["patience"]),
    ({"patience": 0}, PLAN, []),
    ({"patience": 1, "validate_every": 5}, {"plan": replace(PLAN["plan"], every=5)}, ["patience"]),
    ({"patience": 3, "validate_every": 3}, PLAN, []),
    ({"patience": 99}, {}, []),
]  # fmt: skip


@pytest.mark.parametrize(("options", "decides", "keys"), ROWS, ids=str)
def test_what_the_network_and_the_photos_make_useless_is_named(
    options: dict[str, Any], decides: dict[str, Any], keys: list[str]
) -> None:
    settings = load_settings("default", options)
    network, _ = new_network(settings.recipe, classes=2)
    found = without_effect(settings, Situation(recipe=settings.recipe, network=network, **decides))
    assert [sentence.partition(" has no effect: ")[0] for sentence in found] == keys


def test_each_key_is_named_once_and_only_if_the_user_set_it() -> None:
    settings = load_settings("default", {"network": "bn_mlp", "auxiliary_weight": 1})
    network, _ = new_network(settings.recipe, classes=2)
    found = without_effect(settings, Situation(recipe=settings.recipe, network=network, own_val=True, **PLAN))
    assert found == ["auxiliary_weight has no effect: it is for auxiliary true"]
