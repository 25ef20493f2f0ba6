import pytest

from bnlab.nets import build
from bnlab.nets.freeze import freeze
from bnlab.recipe import Recipe
from bnlab.training.optimizer import make_optimizer, set_learning_rate


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_weight_decay_spares_gamma_beta_and_biases(name: str) -> None:
    network = build("bn_small_inception", classes=3)
    optimizer = make_optimizer(network, Recipe(optimizer=name, weight_decay=0.1))
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0)
    names = {id(p): n for n, p in network.named_parameters()}
    assert all(names[id(p)].endswith(("conv.weight", "fc.weight")) for p in decayed["params"])
    assert all(names[id(p)].endswith(("bn.weight", "bn.bias", "fc.bias")) for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_the_backbone_has_its_own_learning_rate() -> None:
    network = build("bn_googlenet", classes=3, width=0.25, auxiliary=True)
    optimizer = make_optimizer(network, Recipe(backbone_lr_factor=0.25))
    set_learning_rate(optimizer, 0.8)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in network.named_parameters():
        assert rates[id(parameter)] == (0.8 if name.split(".")[0] in ("fc", "aux1", "aux2") else 0.2), name


def test_frozen_parameters_are_not_optimised() -> None:
    network = build("bn_small_inception", classes=3)
    freeze(network, "backbone", norms=False)
    optimizer = make_optimizer(network, Recipe(backbone_lr_factor=0.25))
    assert [p for group in optimizer.param_groups for p in group["params"]] == [network.fc.weight, network.fc.bias]
