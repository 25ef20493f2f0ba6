import pytest
import torch
from torch import nn

from bnlab import norm
from bnlab.errors import UsageError
from bnlab.nets import build
from bnlab.nets.blocks import ConvNormAct, conv_norm_acts
from bnlab.nets.options import ACTIVATIONS, choose_norm


@pytest.mark.parametrize(
    ("name", "of_maps", "of_units"),
    [
        ("batch", norm.BatchNorm2d, norm.BatchNorm1d),
        ("sync", norm.SyncBatchNorm, norm.SyncBatchNorm),
        ("ghost", norm.GhostBatchNorm2d, norm.GhostBatchNorm1d),
        ("whitening", norm.Whitening2d, norm.Whitening1d),
    ],
)
def test_every_kind_of_normalisation(name: str, of_maps: type[nn.Module], of_units: type[nn.Module]) -> None:
    makers = choose_norm(name, eps=0.01, momentum=0.3)
    for maker, kind in zip(makers, (of_maps, of_units), strict=True):
        assert maker is not None
        layer = maker(24)
        assert type(layer) is kind
        assert (layer.num_features, layer.eps, layer.momentum) == (24, 0.01, 0.3)
    for network in ("small_inception", "mlp"):
        kind = of_units if network == "mlp" else of_maps
        layers = {type(unit.bn) for unit in conv_norm_acts(build(network, classes=2, norm=name))}
        assert layers == {kind}


def test_none_makes_no_layer() -> None:
    assert choose_norm("none", eps=0.01, momentum=0.3) == (None, None)
    for name in ("bn_small_inception", "bn_mlp"):
        assert {type(unit.bn) for unit in conv_norm_acts(build(name, classes=2, norm="none"))} == {nn.Identity}


@pytest.mark.parametrize(("name", "size"), [("ghost", 32), ("ghost:7", 7)])
def test_the_size_of_a_ghost_batch(name: str, size: int) -> None:
    for maker in choose_norm(name, eps=1e-5, momentum=0.1):
        assert maker is not None
        assert maker(8).ghost_size == size


@pytest.mark.parametrize(
    ("name", "channels", "groups"),
    [
        ("whitening", 64, 4),
        ("whitening:8", 64, 8),
        ("whitening:8", 12, 2),
        ("whitening:8", 13, 13),
        ("whitening:99", 12, 1),
    ],
)
def test_whitened_groups_have_the_largest_size_that_divides_the_channels(name: str, channels: int, groups: int) -> None:
    for maker in choose_norm(name, eps=1e-5, momentum=0.1):
        assert maker is not None
        assert maker(channels).groups == groups


@pytest.mark.parametrize(
    ("name", "problem", "remedy"),
    [
        ("bacth", "no norm is called 'bacth'", "did you mean 'batch'?"),
        ("batch:3", "norm batch takes no number", "use batch"),
        ("ghost:x", "'ghost:x' has no number after the colon", "ghost:16"),
        ("ghost:", "'ghost:' has no number after the colon", "ghost:16"),
        *((f"ghost:{bad}", f"norm ghost:{bad} ", "at least 1 after the colon") for bad in ("0", "1.5", "nan", "inf")),
        ("whitening:-2", "norm whitening:-2 ", "whitening:16"),
    ],
)
def test_an_invalid_normalisation_is_refused(name: str, problem: str, remedy: str) -> None:
    with pytest.raises(UsageError) as error:
        build("bn_mlp", classes=2, norm=name)
    assert problem in error.value.problem
    assert remedy in error.value.remedy


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_layer_has_the_chosen_activation(name: str) -> None:
    network = build("bn_small_inception", classes=2, activation=name)
    kinds = {type(unit.activation) for unit in conv_norm_acts(network)}
    assert kinds == {type(ACTIVATIONS[name]())}
    unit = network.get_submodule("conv1")
    assert isinstance(unit, ConvNormAct)
    x = torch.randn(4, 3, 9, 9)
    y, expected = unit(x), ACTIVATIONS[name]()(unit.bn(unit.layer(x)).clone())
    torch.testing.assert_close(y, expected)
    weights = list(unit.parameters())
    ours, plain = (torch.autograd.grad(output.sin().sum(), weights) for output in (y, expected))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
