from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnlab.errors import UsageError
from bnlab.nets import build
from bnlab.nets.freeze import Part, freeze
from bnlab.nets.network import TableNetwork


def trained(network: TableNetwork) -> set[str]:
    """The layers in which any number, statistics included, changes in two steps of training."""
    before = {key: value.clone() for key, value in network.state_dict().items()}
    network.train()  # every training loop calls it, and it must not undo the freezing
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    torch.manual_seed(0)
    for _ in range(2):
        outputs = network(torch.randn(4, 3, 32, 32))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum(F.cross_entropy(o, torch.tensor([0, 1, 2, 0])) for o in outputs)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
    return {key.split(".")[0] for key, value in network.state_dict().items() if not torch.equal(value, before[key])}


STEM = {"conv1", "conv2", "conv3"}
ALL = set(build("bn_googlenet", classes=3, width=0.25).order) - {"pool1", "pool2", "pool3", "pool4"} | {"fc"}


@pytest.mark.parametrize(
    ("part", "changes"),
    [("none", ALL | {"aux1", "aux2"}), ("stem", ALL - STEM | {"aux1", "aux2"}), ("backbone", {"fc", "aux1", "aux2"})],
)
def test_frozen_layers_do_not_change_to_the_bit(part: Part, changes: set[str]) -> None:
    network = build("bn_googlenet", classes=3, width=0.25, auxiliary=True)
    freeze(network, part, norms=False)
    assert trained(network) == changes


def test_frozen_normalisation_lets_the_filters_train() -> None:
    network = build("bn_small_inception", classes=3)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    frozen = freeze(network, "none", norms=True)
    assert "conv1" in trained(network)
    changed = {key.split(".")[-2] for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"conv", "fc"}
    assert frozen.norms == 43
    assert frozen.parameters == sum(p.numel() for n, p in network.named_parameters() if ".bn." in n)


def test_heads_are_never_frozen() -> None:
    """They are new in fine-tuning, so their statistics are not those of any batch."""
    network = build("bn_googlenet", classes=3, width=0.25, auxiliary=True)
    frozen = freeze(network, "backbone", norms=True)
    assert frozen.norms == 57 + 9  # three in the stem, seven in each of nine blocks
    assert all(p.requires_grad for p in network.get_submodule("aux1").parameters())
    assert network.get_submodule("aux1.conv.bn").training


@pytest.mark.parametrize(
    ("name", "part", "options", "text"),
    [
        (
            "bn_mlp",
            "backbone",
            {},
            "hidden1 to hidden3 and the statistics, gamma and beta of 3 normalisation layers "
            "(255,800 of 256,103 parameters)",
        ),
        ("mlp", "backbone", {}, "hidden1 to hidden3 (255,500 of 255,803 parameters)"),
        ("bn_mlp", "none", {}, ""),
    ],
)
def test_the_report_says_what_is_frozen(name: str, part: Part, options: dict[str, Any], text: str) -> None:
    network = build(name, classes=3, **options)
    frozen = freeze(network, part, norms=False)
    assert frozen.of == sum(p.numel() for p in network.parameters())
    assert str(frozen).endswith(text), str(frozen)


def test_a_network_without_a_stem() -> None:
    with pytest.raises(UsageError, match=r"mlp has no stem.*: use backbone or none"):
        freeze(build("mlp", classes=3), "stem", norms=False)


def test_a_users_own_normalisation_is_frozen_too() -> None:
    network = build("bn_small_inception", classes=3, norm=nn.BatchNorm2d, width=0.25)
    frozen = freeze(network, "backbone", norms=False)
    assert frozen.norms == 43 and trained(network) == {"fc"}
