from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bnlab.errors import UsageError
from bnlab.nets import NETWORKS, build
from bnlab.nets.blocks import conv_norm_acts
from bnlab.nets.registry import ARCHITECTURE_KEYS, CATALOGUE, has_row
from bnlab.nets.tables import Auxiliary
from bnlab.recipe import Recipe

GOLDEN = Path(__file__).parent / "golden"


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("count", "name", "options"),
    [
        # Ioffe & Szegedy's Fig. 5, as it is printed and as it adds up; the softmax alone, no biases before BN.
        (11_285_224, "bn_inception", {"classes": 1000, "variant": "literal"}),
        (11_194_984, "bn_inception", {"classes": 1000, "variant": "corrected"}),
        (11_278_528, "bn_inception", {"classes": 1000, "variant": "literal", "stem": "separable"}),
        # The published GoogLeNet with BN, which keeps its biases.
        (6_280_421, "bn_googlenet", {"classes": 5, "conv_bias": True}),
        (10_620_911, "bn_googlenet", {"classes": 5, "conv_bias": True, "auxiliary": True}),
        # torchvision's.
        (6_624_904, "bn_googlenet", {"classes": 1000, "variant": "torchvision"}),
        (13_004_888, "bn_googlenet", {"classes": 1000, "variant": "torchvision", "auxiliary": True}),
        # By hand: 784 * 100 + 2 * 100 * 100 weights and 300 biases (or gamma and beta); 10 * 101 in the last layer.
        (98_400 + 300 + 1_010, "mlp", {"classes": 10, "in_channels": 1}),
        (98_400 + 600 + 1_010, "bn_mlp", {"classes": 10, "in_channels": 1}),
    ],
)
def test_parameters_are_those_published(count: int, name: str, options: dict[str, Any]) -> None:
    assert parameters(build(name, **options)) == count


@pytest.mark.parametrize("name", [name for name in NETWORKS if name.startswith("bn_")])
def test_without_bn_the_biases_are_kept(name: str) -> None:
    """The twin has a bias where the other has gamma and beta."""
    with_bn, without = build(name, classes=5), build(name.removeprefix("bn_"), classes=5)
    assert not [key for key in without.state_dict() if ".bn." in key]
    biases = {key for key in without.state_dict() if key.endswith((".conv.bias", ".linear.bias"))}
    betas = {key for key in with_bn.state_dict() if key.endswith(".bn.bias")}
    assert len(biases) == len(betas) > 2
    assert not biases & set(with_bn.state_dict())


def test_only_what_normalisation_undoes_is_left_out() -> None:
    """Behind the activation it does not undo a bias before it."""
    for options, biased in (({}, False), ({"placement": "after"}, True), ({"conv_bias": True}, True)):
        units = conv_norm_acts(build("bn_small_inception", classes=2, **options))  # type: ignore[arg-type]
        assert {unit.layer.bias is not None for unit in units} == {biased}


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_shapes_of_the_weights_stay(name: str) -> None:
    """A classifier file of today must load tomorrow. To write the lists anew: python -m tests.nets.test_build."""
    assert described(name) == (GOLDEN / f"{name}.txt").read_text("utf-8")


def described(name: str) -> str:
    """The state_dict, heads and all: one tensor a line."""
    with torch.device("meta"):
        network = build(name, classes=5, auxiliary=has_row(name, Auxiliary))
    return "".join(
        f"{key} {' '.join(map(str, value.shape))}".rstrip() + "\n" for key, value in network.state_dict().items()
    )


def test_twins_begin_with_the_same_weights() -> None:
    """Whether or not there are biases, normalisation or something after it: else twins would differ by chance too."""
    plain = build("bn_small_inception", classes=3, seed=4)
    weights = {name: value for name, value in plain.named_parameters() if name.endswith(("conv.weight", "fc.weight"))}
    assert len(weights) > 10
    for twin in (
        build("small_inception", classes=3, seed=4),
        build("bn_small_inception", classes=3, seed=4, conv_bias=True),
        build("bn_small_inception", classes=3, seed=4, placement="after"),
        build("bn_small_inception", classes=3, seed=4, norm="whitening:4"),
    ):
        others = dict(twin.named_parameters())
        assert all(torch.equal(value, others[name]) for name, value in weights.items())


def test_weights_follow_from_the_seed_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build("bn_small_inception", classes=3, seed=1)
    torch.testing.assert_close(torch.rand(3), expected)  # torch's own generator is where it was
    assert torch.equal(first.fc.weight, build("bn_small_inception", classes=3, seed=1).fc.weight)
    assert not torch.equal(first.fc.weight, build("bn_small_inception", classes=3, seed=2).fc.weight)


def test_a_gpus_generator_is_left_alone_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail(f"seeded by {seed}"))
    build("mlp", classes=3, seed=7)


def test_every_option_of_the_shape_is_a_key_of_recipes_and_of_cards() -> None:
    """Or fine-tuning would not take it from the file."""
    assert set(ARCHITECTURE_KEYS) <= set(Recipe.model_fields)
    assert {*ARCHITECTURE_KEYS, "dropout", "in_channels"} == set(build("mlp", classes=2).arguments)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_tells_what_builds_it_again(name: str) -> None:
    changed: dict[str, Any] = {
        "variant": list(CATALOGUE[name].variants)[-1],
        "norm": "ghost:4",
        "norm_eps": 0.01,
        "norm_momentum": None,
        "activation": "elu",
        "placement": "after",
        "conv_bias": True,
        "width": 0.5,
        "dropout": 0.3,
        "in_channels": 2,
    }
    if CATALOGUE[name].stems:
        changed |= {"stem": "separable", "local_response": True}
    network = build(name, classes=4, **changed)
    again = build(network.name, classes=4, **network.arguments)
    assert changed.items() <= network.arguments.items()
    assert str(again) == str(network)
    x = torch.randn(4, 2, 40, 40)
    torch.testing.assert_close(again.eval()(x), network.eval()(x), rtol=0, atol=0)


def test_defaults_are_the_networks_own() -> None:
    assert build("inception", classes=2).dropout.p == 0.4
    assert build("bn_inception", classes=2).dropout.p == 0
    assert build("inception", classes=2, dropout=0.0).dropout.p == 0
    assert build("mlp", classes=2).arguments["activation"] == "sigmoid"
    assert build("bn_inception", classes=2).arguments["variant"] == "literal"


def test_a_normalisation_of_your_own() -> None:
    network = build("bn_small_inception", classes=2, norm=lambda channels: nn.GroupNorm(2, channels))
    assert sum(isinstance(m, nn.GroupNorm) for m in network.modules()) == 43
    assert network(torch.randn(1, 3, 32, 32)).shape == (1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "bn_gogglenet"}, "no network is called 'bn_gogglenet': did you mean 'bn_googlenet'?"),
        ({"variant": "littoral"}, "bn_inception has no variant 'littoral': did you mean 'literal'?"),
        ({"stem": "tiny"}, "bn_inception has no stem 'tiny' beside its table's own: there are separable, small"),
        ({"name": "mlp", "stem": "small"}, "mlp has no stem 'small' beside its table's own: leave it out"),
        ({"activation": "rleu"}, "no activation is called 'rleu': did you mean 'relu'?"),
        ({"placement": "beside"}, "placement 'beside' cannot be: say before or after"),
        (
            {"placement": "after", "norm": "none"},
            "bn_inception has no normalisation to place after the activation: leave placement out",
        ),
        ({"width": 0}, "width 0 cannot be: it is a factor, above 0 and up to 16"),
        ({"width": 17}, "width 17 cannot be: it is a factor, above 0 and up to 16"),
        ({"width": float("nan")}, "width nan cannot be: it is a factor, above 0 and up to 16"),
        ({"classes": 0}, "classes 0 cannot be: give a whole number of at least 1"),
        ({"width": "1"}, "width '1' cannot be: give a number"),
        ({"dropout": True}, "dropout True cannot be: give a number"),
        ({"stem": ["small"]}, "stem ['small'] cannot be: give a name"),
        ({"name": 3}, "name 3 cannot be: give a name"),
        ({"classes": True}, "classes True cannot be: give a whole number of at least 1"),
        ({"norm": lambda channels: None}, "norm made a NoneType, not a layer: return an nn.Module"),
        ({"classes": 2.5}, "classes 2.5 cannot be: give a whole number of at least 1"),
        ({"in_channels": -1}, "in_channels -1 cannot be: give a whole number of at least 1"),
        ({"dropout": 1}, "dropout 1 cannot be: it is a share, at least 0 and below 1"),
        ({"norm_eps": 0}, "norm_eps 0 cannot be: it is a small number above 0"),
        ({"norm_momentum": 2}, "norm_momentum 2 cannot be: it is the new batch's weight, 0 to 1"),
        ({"name": "mlp", "auxiliary": True}, "mlp has no auxiliary classifiers: leave auxiliary out"),
        (
            {"name": "mlp", "local_response": True},
            "mlp has no place for local response normalisation: leave local_response out",
        ),
        (
            {"initialisation": "hee"},
            "no initialisation is called 'hee': did you mean 'he'?",
        ),
        (
            {"initialisation": "gaussian"},
            "initialisation gaussian cannot be: give its standard deviation, as in gaussian:0.05",
        ),
        (
            {"initialisation": "gaussian:-1"},
            "initialisation gaussian:-1 cannot be: give its standard deviation, as in gaussian:0.05",
        ),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        build(**({"name": "bn_inception", "classes": 2} | options))
    assert str(error.value) == message


if __name__ == "__main__":
    for each in NETWORKS:
        (GOLDEN / f"{each}.txt").write_text(described(each), encoding="utf-8")
