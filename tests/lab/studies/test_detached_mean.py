import copy
from typing import Any

import pytest
import torch

from bnlab.lab.studies.bias.detached_mean import ARMS, OUTSIDE, SCALED, WITHIN, DetachedMean, Growth, make_network
from bnlab.nets.blocks import conv_norm_acts
from bnlab.recipe import Recipe


@pytest.mark.parametrize("arm", ARMS)
def test_output_has_no_mean_whatever_the_bias(arm: str) -> None:
    u = torch.tensor([[1.0, 5.0], [3.0, 9.0]])
    layer = DetachedMean(2, arm)
    before = layer(u)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([7.0, -3.0]))
    torch.testing.assert_close(layer(u), before)
    expected = torch.tensor([[-1.0, -1.0], [1.0, 1.0]]) if arm == SCALED else torch.tensor([[-1.0, -2.0], [1.0, 2.0]])
    torch.testing.assert_close(before, expected, rtol=1e-4, atol=0)


def test_gradient_of_the_bias_is_the_papers() -> None:
    weighting = torch.tensor([[2.0], [3.0]])
    expected = {WITHIN: 0.0, OUTSIDE: 5.0, SCALED: 5.0}  # -db is the sum of dl/dxhat where E[x] is ignored
    for arm, gradient in expected.items():
        layer = DetachedMean(1, arm)
        (layer(torch.tensor([[-1.0], [1.0]])) * weighting).sum().backward()
        assert layer.bias.grad is not None
        assert float(layer.bias.grad) == pytest.approx(gradient, rel=1e-4)


def test_maps_are_centred_over_photos_and_positions() -> None:
    x = torch.arange(16.0).view(2, 2, 2, 2)
    y = DetachedMean(2, WITHIN)(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(2))
    assert y.shape == x.shape


@pytest.mark.parametrize("alone", [True, False])
def test_alone_nothing_but_the_biases_is_trained(alone: bool) -> None:
    network = make_network(Recipe(network="mlp", width=0.05), 2, OUTSIDE, alone=alone)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    biases = {f"hidden{i}.bn.bias" for i in (1, 2, 3)}
    weights = {f"hidden{i}.linear.weight" for i in (1, 2, 3)} | {"fc.weight", "fc.bias"}
    assert trained == (biases if alone else biases | weights)


class Context:
    def __init__(self) -> None:
        self.network = make_network(Recipe(network="mlp", width=0.05), 2, OUTSIDE, alone=True)


def test_growth_by_hand_leaves_the_network_alone() -> None:
    context: Any = Context()
    probe = Growth(every=2)
    probe.images, probe.labels = torch.rand(6, 3, 28, 28), torch.tensor([0, 1] * 3)
    with torch.no_grad():
        for value, unit in zip((3.0, 4.0, 12.0), conv_norm_acts(context.network), strict=True):
            assert isinstance(unit.bn.bias, torch.nn.Parameter)
            unit.bn.bias[0] = value
        context.network.fc.weight.zero_()
    before, state = copy.deepcopy(context.network.state_dict()), torch.get_rng_state()
    context.network.train()
    for step in range(3):
        probe.before(step, context)
        probe.after(step, context)
    rows = probe.results["growth"]
    assert [row["step"] for row in rows] == [0, 2]
    assert {row["norm"] for row in rows} == {13.0}
    assert [row["loss"] for row in rows] == pytest.approx([0.6931472] * 2)
    assert context.network.training
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(context.network.state_dict(), before, rtol=0, atol=0)
