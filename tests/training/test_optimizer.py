import pytest
import torch

from bnlab.nets import build
from bnlab.nets.freeze import freeze
from bnlab.recipe import Recipe
from bnlab.training.optimizer import clip_gradients, make_optimizer, set_learning_rate


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
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


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_and_adamw_are_torchs(name: str, kind: type[torch.optim.Optimizer]) -> None:
    """With adamw the decay does not pass through the moments, so that both differ."""
    ours, plain, other = (build("mlp", classes=3) for _ in range(3))
    recipe = Recipe(optimizer=name, weight_decay=0.3, learning_rate=0.01)
    optimizer = make_optimizer(ours, recipe)
    decayed = [p for p in plain.parameters() if p.ndim > 1]
    rest = [p for p in plain.parameters() if p.ndim == 1]
    expected = kind([{"params": decayed, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}], lr=0.01)  # type: ignore[call-arg]
    for step in range(3):
        for network, by in ((ours, optimizer), (plain, expected)):
            for i, p in enumerate(network.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            by.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(ours.fc.weight, other.fc.weight)
    assert type(optimizer) is kind


def test_gradients_are_clipped_over_all_groups_together() -> None:
    network = build("mlp", classes=3)
    optimizer = make_optimizer(network, Recipe(backbone_lr_factor=0.25))
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    number = sum(p.numel() for p in network.parameters())
    clip_gradients(optimizer, 2 * number**0.5)
    assert all((p.grad == 1).all() for p in network.parameters() if p.grad is not None)
    clip_gradients(optimizer, 0.5 * number**0.5)
    for p in network.parameters():
        torch.testing.assert_close(p.grad, torch.full_like(p, 0.5))
