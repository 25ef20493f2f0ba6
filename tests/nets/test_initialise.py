from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab.errors import UsageError
from bnlab.nets import build, lsuv_init
from bnlab.nets.blocks import conv_norm_acts


def spread(layer: Any) -> float:
    return float(layer.weight.detach().std())


def test_he_before_one_sided_activations_and_xavier_before_others() -> None:
    """The standard deviations by hand, for 192 -> 384 channels of 3 x 3 in 5b, and for 784 * 3 -> 100 units."""
    wide = build("googlenet", classes=2).get_submodule("inception5b.branch2.1.conv")
    assert spread(wide) == pytest.approx((2 / (384 * 9)) ** 0.5, rel=0.01)
    wide = build("googlenet", classes=2, activation="tanh").get_submodule("inception5b.branch2.1.conv")
    assert spread(wide) == pytest.approx((2 / ((384 + 192) * 9)) ** 0.5, rel=0.01)
    hidden = build("mlp", classes=2).get_submodule("hidden1.linear")
    assert spread(hidden) == pytest.approx((2 / (784 * 3 + 100)) ** 0.5, rel=0.01)
    hidden = build("mlp", classes=2, initialisation="he").get_submodule("hidden1.linear")
    assert spread(hidden) == pytest.approx((2 / 100) ** 0.5, rel=0.01)


def test_gaussian_fills_every_conv_norm_act_and_last_layers_begin_small() -> None:
    network = build("bn_googlenet", classes=50, initialisation="gaussian:0.3", auxiliary=True)
    for unit in conv_norm_acts(network):
        assert spread(unit.layer) == pytest.approx(0.3, rel=0.1)
    for name in ("fc", "aux1.fc1", "aux2.fc2"):
        assert spread(network.get_submodule(name)) == pytest.approx(0.01, rel=0.05)
    assert not [n for n, p in network.named_parameters() if n.endswith((".bias", "fc.bias")) and p.any()]


@pytest.mark.parametrize("name", ["googlenet", "inception"])
def test_a_separable_stem_keeps_the_scale_of_a_plain_one(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 64, 64)
    plain, separable = (
        float(build(name, classes=2, stem=stem).get_submodule("conv1.conv")(x).detach().std())
        for stem in (None, "separable")
    )
    # By fan-out, 3 * 49 inputs and 64 * 49 outputs scale by sqrt(2 * 3 / 64), 24 and 64 by sqrt(2 * 24 / 64).
    assert plain == pytest.approx((2 * 3 / 64) ** 0.5, rel=0.2)
    assert separable == pytest.approx((2 * 24 / 64) ** 0.5, rel=0.2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("small_inception", {}),
        ("small_inception", {"activation": "sigmoid"}),
        ("mlp", {}),
        ("googlenet", {"auxiliary": True, "width": 0.25, "stem": "separable"}),
    ],
    ids=str,
)
def test_lsuv_gives_every_layer_the_same_scale(name: str, options: dict[str, Any]) -> None:
    network = build(name, classes=3, initialisation="gaussian:0.7", **options)
    images = torch.randn(8, 3, 64, 64) * 5 + 2
    units = conv_norm_acts(network)
    assert lsuv_init(network, images) == len(units) > 2
    seen: list[Tensor] = []
    for unit in units:
        assert not unit.layer._forward_hooks
        unit.layer.register_forward_hook(lambda _m, _i, output: seen.append(output.detach().clone()))
    network(images)
    assert len(seen) == len(units)
    for output in seen:
        assert float(output.square().mean()) == pytest.approx(1, abs=1e-3)


def test_lsuv_scales_complete_layers() -> None:
    """By hand: outputs of 3 and -4 in equal numbers have a mean square of 12.5."""
    network = build("mlp", classes=2, in_channels=1)
    hidden: Any = network.get_submodule("hidden1.linear")
    nn.init.zeros_(hidden.weight)
    nn.init.constant_(hidden.bias[:50], 3.0)
    nn.init.constant_(hidden.bias[50:], -4.0)
    lsuv_init(network, torch.randn(5, 1, 28, 28))
    torch.testing.assert_close(hidden.bias[[0, 99]].detach(), torch.tensor([3.0, -4.0]) / 12.5**0.5)


def test_lsuv_does_not_scale_outputs_of_zeros() -> None:
    network = build("mlp", classes=2, in_channels=1)
    hidden: Any = network.get_submodule("hidden2.linear")
    nn.init.zeros_(hidden.weight)
    assert lsuv_init(network, torch.randn(1, 1, 28, 28)) == 3
    assert not hidden.weight.any()


def test_lsuv_draws_no_random_numbers_and_keeps_the_mode() -> None:
    network = build("small_inception", classes=2, dropout=0.5)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    lsuv_init(network, torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.rand(2), expected)
    assert network.training


@pytest.mark.parametrize(
    ("name", "options", "value", "problem", "remedy"),
    [
        ("bn_mlp", {}, 0.0, "normalisation would undo", "leave lsuv_init out"),
        ("mlp", {}, torch.nan, "not finite", "another seed"),
        ("mlp", {"initialisation": "gaussian:1e-41"}, 1.0, "too small or too large", "another initialisation"),
    ],
)
def test_lsuv_refuses_and_changes_nothing(
    name: str, options: dict[str, Any], value: float, problem: str, remedy: str
) -> None:
    network = build(name, classes=2, **options)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(UsageError) as error:
        lsuv_init(network, torch.full((4, 3, 28, 28), value))
    assert problem in error.value.problem
    assert remedy in error.value.remedy
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert not [m for m in network.modules() if m._forward_hooks]


@pytest.mark.parametrize("fitted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_with_lsuv_a_deep_network_without_bn_learns_from_a_bad_scale(fitted: bool) -> None:
    """The weights are ten times too small, so that the logits do not depend on the images unless layers are scaled."""
    torch.manual_seed(0)
    labels = torch.arange(16) % 2
    images = torch.randn(16, 3, 32, 32) + labels.view(-1, 1, 1, 1) * 2
    network = build("googlenet", classes=2, width=0.25, initialisation="gaussian:0.01")
    if fitted:
        lsuv_init(network, images)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    for _ in range(20):
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert (loss.item() < 0.3) == fitted, loss.item()  # guessing has log 2


@pytest.mark.parametrize(
    "scale",
    [
        "gaussian:0.01",
        *(pytest.param(scale, marks=pytest.mark.slow) for scale in ("gaussian:0.001", "he", "gaussian:0.2")),
    ],
)
def test_a_batch_normalised_network_learns_from_weights_of_any_scale(scale: str) -> None:
    """From scratch, with both heads, which torchvision's own network did not (pytorch/vision#821)."""
    torch.manual_seed(0)
    labels = torch.arange(8) % 2
    images = torch.randn(8, 3, 32, 32) + labels.view(-1, 1, 1, 1) * 2
    network = build("bn_googlenet", classes=2, width=0.25, initialisation=scale, auxiliary=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(15):
        losses = [F.cross_entropy(output, labels) for output in network(images)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert losses[0].item() < 0.1
