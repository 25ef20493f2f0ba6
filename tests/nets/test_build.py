from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bnlab.errors import UsageError
from bnlab.nets import NETWORKS, build
from bnlab.nets.blocks import conv_norm_acts
from bnlab.nets.registry import ARCHITECTURE_KEYS, has_row
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
def test_a_network_without_bn_has_a_bias_where_the_other_has_gamma_and_beta(name: str) -> None:
    with_bn, without = build(name, classes=5), build(name.removeprefix("bn_"), classes=5)
    assert not [key for key in without.state_dict() if ".bn." in key]
    biases = {key for key in without.state_dict() if key.endswith((".conv.bias", ".linear.bias"))}
    betas = {key for key in with_bn.state_dict() if key.endswith(".bn.bias")}
    assert len(biases) == len(betas) > 2
    assert not biases & set(with_bn.state_dict())


def test_only_biases_that_normalisation_makes_redundant_are_left_out() -> None:
    """Normalisation after the activation does not remove a bias before the activation."""
    for options, biased in (({}, False), ({"placement": "after"}, True), ({"conv_bias": True}, True)):
        units = conv_norm_acts(build("bn_small_inception", classes=2, **options))  # type: ignore[arg-type]
        assert {unit.layer.bias is not None for unit in units} == {biased}


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_shapes_of_the_weights_do_not_change(name: str) -> None:
    """Later versions must load the classifier files of today. `python -m tests.nets.test_build` writes the lists."""
    assert described(name) == (GOLDEN / f"{name}.txt").read_text("utf-8")


def described(name: str) -> str:
    """The state_dict, heads and all: one tensor a line."""
    with torch.device("meta"):
        network = build(name, classes=5, auxiliary=has_row(name, Auxiliary))
    return "".join(
        f"{key} {' '.join(map(str, value.shape))}".rstrip() + "\n" for key, value in network.state_dict().items()
    )


def test_networks_with_and_without_bn_begin_with_the_same_weights() -> None:
    """Otherwise a comparison of the two would also compare their random weights."""
    plain = build("bn_small_inception", classes=3, seed=4)
    weights = {name: value for name, value in plain.named_parameters() if name.endswith(("conv.weight", "fc.weight"))}
    assert len(weights) > 10
    for other in (
        build("small_inception", classes=3, seed=4),
        build("bn_small_inception", classes=3, seed=4, conv_bias=True),
        build("bn_small_inception", classes=3, seed=4, placement="after"),
        build("bn_small_inception", classes=3, seed=4, norm="whitening:4"),
    ):
        others = dict(other.named_parameters())
        assert all(torch.equal(value, others[name]) for name, value in weights.items())


def test_weights_follow_from_the_seed_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build("bn_small_inception", classes=3, seed=1)
    torch.testing.assert_close(torch.rand(3), expected)  # torch's own generator did not move
    assert torch.equal(first.fc.weight, build("bn_small_inception", classes=3, seed=1).fc.weight)
    assert not torch.equal(first.fc.weight, build("bn_small_inception", classes=3, seed=2).fc.weight)


def test_no_gpu_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail(f"seeded by {seed}"))
    build("mlp", classes=3, seed=7)


def test_every_architecture_key_is_a_key_of_recipes_and_an_argument() -> None:
    """Otherwise fine-tuning would not inherit it from the file."""
    assert set(ARCHITECTURE_KEYS) <= set(Recipe.model_fields)
    assert {*ARCHITECTURE_KEYS, "dropout", "in_channels"} == set(build("mlp", classes=2).arguments)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_networks_arguments_build_it_again(name: str) -> None:
    changed: dict[str, Any] = {
        "variant": list(NETWORKS[name].variants)[-1],
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
    if NETWORKS[name].stems:
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


def test_a_users_own_normalisation() -> None:
    network = build("bn_small_inception", classes=2, norm=lambda channels: nn.GroupNorm(2, channels))
    assert sum(isinstance(m, nn.GroupNorm) for m in network.modules()) == 43
    assert network(torch.randn(1, 3, 32, 32)).shape == (1, 2)
    assert network.arguments["norm"] is None


@pytest.mark.parametrize(
    ("options", "problem", "remedy"),
    [
        ({"name": "bn_gogglenet"}, "no network is called 'bn_gogglenet'", "did you mean 'bn_googlenet'?"),
        ({"variant": "littoral"}, "no variant of bn_inception is called 'littoral'", "'literal'"),
        ({"stem": "tiny"}, "no stem of bn_inception is called 'tiny'", "separable, small"),
        ({"name": "mlp", "stem": "small"}, "mlp has no stem 'small'", "leave stem out"),
        ({"activation": "rleu"}, "no activation is called 'rleu'", "'relu'"),
        ({"placement": "beside"}, "placement 'beside'", "before or after"),
        ({"placement": "after", "norm": "none"}, "bn_inception has no normalisation", "leave placement out"),
        ({"width": 0}, "width 0 ", "above 0"),
        ({"width": 17}, "width 17 ", "at most 16"),
        ({"width": float("nan")}, "width nan ", "above 0"),
        ({"width": "1"}, "width '1' ", "use a factor"),
        ({"width": None}, "width None ", "use a factor"),
        ({"dropout": True}, "dropout True ", "fraction"),
        ({"dropout": 1}, "dropout 1 ", "below 1"),
        ({"stem": ["small"]}, "no stem of bn_inception is called '['small']'", "did you mean 'small'?"),
        ({"name": 3}, "no network is called '3'", "there are "),
        ({"classes": True}, "classes True ", "at least 1"),
        ({"classes": 0}, "classes 0 ", "at least 1"),
        ({"classes": 2.5}, "classes 2.5 ", "whole number"),
        ({"classes": None}, "classes None ", "whole number"),
        ({"in_channels": -1}, "in_channels -1 ", "at least 1"),
        ({"seed": "one"}, "seed 'one' ", "whole number"),
        ({"norm": lambda channels: None}, "norm made a NoneType", "nn.Module"),
        ({"norm_eps": 0}, "norm_eps 0 ", "above 0"),
        ({"norm_momentum": 2}, "norm_momentum 2 ", "0 to 1"),
        ({"name": "mlp", "auxiliary": True}, "mlp has no auxiliary classifiers", "leave auxiliary out"),
        ({"name": "mlp", "local_response": True}, "mlp has no local response", "leave local_response out"),
        ({"initialisation": "hee"}, "no initialisation is called 'hee'", "'he'"),
        ({"initialisation": "gaussian"}, "initialisation gaussian ", "gaussian:0.05"),
        ({"initialisation": "gaussian:-1"}, "initialisation gaussian:-1 ", "gaussian:0.05"),
    ],
)
def test_an_error_says_what_is_wrong_and_what_to_use(options: dict[str, Any], problem: str, remedy: str) -> None:
    with pytest.raises(UsageError) as error:
        build(**({"name": "bn_inception", "classes": 2} | options))
    assert problem in error.value.problem
    assert remedy in error.value.remedy


def test_an_invalid_argument_in_full() -> None:
    with pytest.raises(UsageError) as error:
        build("mlp", classes=0)
    assert str(error.value) == "classes 0 is not valid: use a whole number of at least 1"


if __name__ == "__main__":
    for each in NETWORKS:
        (GOLDEN / f"{each}.txt").write_text(described(each), encoding="utf-8")
