from pathlib import Path

import pytest

from bnlab.errors import UsageError
from bnlab.nets import build, registry, tables
from bnlab.nets.options import ACTIVATIONS, NORMS
from bnlab.nets.registry import ARCHITECTURE_KEYS, NETWORKS

PAGE = (Path(__file__).parents[2] / "docs" / "nets.md").read_text("utf-8")


def test_the_page_names_every_network_and_every_choice() -> None:
    for name, network in NETWORKS.items():
        for word in (name, *(v for v in network.variants if v != "table"), *network.stems):
            assert f"`{word}`" in PAGE, word
    for word in (
        *ACTIVATIONS,
        *ARCHITECTURE_KEYS,
        *(n for n in NORMS if n not in ("ghost", "whitening")),
        "ghost:SIZE",
    ):
        assert f"`{word}`" in PAGE, word


def test_networks_with_and_without_bn_differ_in_nothing_else() -> None:
    for name in ("googlenet", "inception", "small_inception", "mlp"):
        with_bn, without = registry.find(f"bn_{name}"), registry.find(name)
        assert (with_bn.norm, without.norm) == ("batch", "none")
        assert with_bn.variants == without.variants
        assert (with_bn.stems, with_bn.activation) == (without.stems, without.activation)


def test_which_networks_have_auxiliary_heads() -> None:
    with_heads = {name for name in NETWORKS if registry.has_row(name, tables.Auxiliary)}
    assert with_heads == {"bn_googlenet", "googlenet", "bn_inception", "inception"}


def test_stem_and_width_together() -> None:
    depthwise, pointwise = build("inception", classes=2, stem="separable", width=0.5).get_submodule("conv1.conv")
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (3, 24, 3)
    assert (depthwise.kernel_size, depthwise.stride) == ((7, 7), (2, 2))
    assert (pointwise.in_channels, pointwise.out_channels, pointwise.kernel_size) == (24, 32, (1, 1))


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no network is called 'x': .*bn_googlenet"):
        registry.find("x")
