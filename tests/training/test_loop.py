import math

import pytest
import torch
from tests.classifier.test_evaluate import KNOWN, answers
from torch.nn import functional as F

from bnlab.nets import build
from bnlab.nets.freeze import freeze
from bnlab.recipe import Recipe
from bnlab.training.checkpoint import Position
from bnlab.training.loop import judge_epoch, make_optimizer, out_of_patience, set_learning_rate, total_loss


def test_auxiliary_losses_count_for_their_weight() -> None:
    torch.manual_seed(0)
    outputs = tuple(torch.randn(4, 3) for _ in range(3))
    targets = torch.tensor([0, 1, 2, 0])
    main, first, second = (F.cross_entropy(o, targets) for o in outputs)
    recipe = Recipe(label_smoothing=0, auxiliary_weight=0.3)
    torch.testing.assert_close(total_loss(outputs, targets, recipe), main + 0.3 * first + 0.3 * second)
    torch.testing.assert_close(total_loss(outputs[0], targets, recipe), main)


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


def test_the_trunk_has_its_own_learning_rate() -> None:
    network = build("bn_googlenet", classes=3, width=0.25, auxiliary=True)
    optimizer = make_optimizer(network, Recipe(trunk_rate=0.25))
    set_learning_rate(optimizer, 0.8)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in network.named_parameters():
        assert rates[id(parameter)] == (0.8 if name.split(".")[0] in ("fc", "aux1", "aux2") else 0.2), name


def test_what_is_frozen_is_no_business_of_the_optimiser() -> None:
    network = build("bn_small_inception", classes=3)
    freeze(network, "trunk", norms=False)
    optimizer = make_optimizer(network, Recipe(trunk_rate=0.25))
    assert [p for group in optimizer.param_groups for p in group["params"]] == [network.fc.weight, network.fc.bias]


def test_the_best_epoch_is_by_accuracy_then_by_loss() -> None:
    position = Position(epoch=0, step=10, seen=20, loss=30.0, right=5, seconds=2.0)
    row, is_best = judge_epoch(position, KNOWN, 0.1)
    assert is_best
    assert (row["epoch"], row["train_loss"], row["train_top1"], row["images_per_second"]) == (1, 1.5, 0.25, 10)
    assert (row["val_top1"], row["val_loss"]) == (KNOWN.top1, KNOWN.loss)
    position.best = row
    assert not judge_epoch(position, KNOWN, 0.1)[1]
    surer = answers(KNOWN.targets.tolist(), [[0.9, 0.1, 0], [0.9, 0.1, 0], [0.2, 0.7, 0.1], [0, 1, 0], [0, 0.1, 0.9]])
    assert surer.top1 == KNOWN.top1
    assert judge_epoch(position, surer, 0.1)[1]
    worse = answers([0, 1], [[0, 1, 0], [1, 0, 0]])
    assert not judge_epoch(position, worse, 0.1)[1]


def test_patience_counts_epochs_since_the_best() -> None:
    position = Position(epoch=5, best={"epoch": 3})
    assert not out_of_patience(position, Recipe(patience=0))
    assert not out_of_patience(position, Recipe(patience=3))
    assert out_of_patience(position, Recipe(patience=2))
    assert not out_of_patience(Position(), Recipe(patience=1))


def test_losses_are_plain_pytorchs() -> None:
    """The loop's step against the same step written out: ten losses, to the last digit."""
    recipe = Recipe(network="bn_small_inception", size=32, dropout=0, label_smoothing=0, weight_decay=0, momentum=0)
    torch.manual_seed(1)
    images, targets = torch.randn(8, 3, 32, 32), torch.arange(8) % 3
    losses: dict[str, list[float]] = {"ours": [], "plain": []}
    for kind, values in losses.items():
        network = build(recipe.network, classes=3, dropout=0.0).train()
        optimizer = make_optimizer(network, recipe) if kind == "ours" else torch.optim.SGD(network.parameters(), 0.1)
        for _ in range(10):
            output = network(images)
            loss = total_loss(output, targets, recipe) if kind == "ours" else F.cross_entropy(output, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
    assert losses["ours"] == losses["plain"]
    assert math.isfinite(losses["ours"][-1])
