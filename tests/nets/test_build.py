import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnlab.errors import UsageError
from bnlab.nets import NETWORKS, build
from bnlab.nets.blocks import pool_to_4x4


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def biases_before_bn(network: nn.Module) -> int:
    return sum(m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d))


def test_parameters_are_those_of_the_published_network() -> None:
    """The published script keeps a bias at every convolution; ours has none before BN, and is otherwise the same."""
    full = build("bn_googlenet", classes=5, auxiliary=True)
    bare = build("bn_googlenet", classes=5)
    assert parameters(full) + biases_before_bn(full) == 10_620_911
    assert parameters(bare) + biases_before_bn(bare) == 6_280_421


def test_without_bn_the_biases_are_kept() -> None:
    """The twin has a bias where the other has gamma and beta."""
    with_bn, without = build("bn_googlenet", classes=5), build("googlenet", classes=5)
    assert parameters(with_bn) - parameters(without) == biases_before_bn(without)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in without.modules())
    assert all(m.bias is not None for m in without.modules() if isinstance(m, nn.Conv2d))


def test_names_are_the_published_ones() -> None:
    names = list(build("bn_googlenet", classes=5, auxiliary=True).state_dict())
    expected = [
        "conv1.conv.weight", "conv3.bn.running_var", "inception3a.branch1.conv.weight",
        "inception4e.branch2.1.bn.weight",
        "inception5b.branch3.2.conv.weight", "inception5b.branch4.1.bn.bias", "aux1.conv.conv.weight", "aux2.fc1.bias",
        "aux1.fc2.weight", "fc.weight", "fc.bias",
    ]  # fmt: skip
    assert set(expected) <= set(names)
    assert (
        len(names) == (3 + 9 * 7 + 2) * 6 + 2 + 2 * 4
    )  # convolutions with BN, the last layer, the heads' linear layers


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [32, 64, 96, 128, 224, 299])
def test_every_size_trains_and_every_parameter_learns(name: str, size: int) -> None:
    network = build(name, classes=3, auxiliary="google" in name)
    torch.manual_seed(0)
    outputs = network(torch.randn(2, 3, size, size))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert [tuple(o.shape) for o in outputs] == [(2, 3)] * (3 if "google" in name else 1)
    sum(F.cross_entropy(o, torch.tensor([0, 2])) for o in outputs).backward()
    without = [n for n, p in network.named_parameters() if p.grad is None]
    assert not without
    network.eval()
    assert network(torch.randn(1, 3, size, size)).shape == (1, 3)


def test_training_gives_main_then_the_later_head_then_the_earlier() -> None:
    network = build("bn_googlenet", classes=2, auxiliary=True)
    for name, value in (("fc", 0.0), ("aux1.fc2", 1.0), ("aux2.fc2", 2.0)):
        layer = network.get_submodule(name)
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, value)
    assert [float(o[0, 0].detach()) for o in network(torch.randn(2, 3, 64, 64))] == [0.0, 2.0, 1.0]


def test_inference_needs_no_heads() -> None:
    network = build("bn_googlenet", classes=2, auxiliary=True)
    bare = build("bn_googlenet", classes=2)
    bare.load_state_dict(network.inference_state())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(bare.eval()(images), network.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(14, 14), (1, 1), (2, 2), (4, 4), (6, 6), (7, 9), (19, 19)])
def test_pooling_to_4x4(shape: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    expected = F.avg_pool2d(x, 5, 3) if shape == (14, 14) else F.adaptive_avg_pool2d(x, 4)
    torch.testing.assert_close(pool_to_4x4(x), expected)


def test_weights_follow_from_the_seed_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build("bn_small_inception", classes=3, seed=1)
    torch.testing.assert_close(torch.rand(3), expected)  # torch's own generator is where it was
    assert torch.equal(first.fc.weight, build("bn_small_inception", classes=3, seed=1).fc.weight)
    assert not torch.equal(first.fc.weight, build("bn_small_inception", classes=3, seed=2).fc.weight)


def test_an_unknown_network_gets_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"no network is called 'bn_gogglenet': did you mean 'bn_googlenet'\?"):
        build("bn_gogglenet", classes=3)
