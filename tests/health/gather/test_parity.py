"""Differences of outputs, and what rounding explains of them."""

import math

import pytest
import torch
from torch import Tensor

from bnlab.health.gather.parity import difference, layer_inputs, most_different, within
from tests.health.checks.networks import sound_network


def test_a_difference_is_in_standard_deviations() -> None:
    expected = torch.tensor([[1.0, 3.0], [1.0, 3.0]], dtype=torch.float64)  # of standard deviation 1
    assert difference([expected + 0.25], [expected]) == pytest.approx(0.25)
    assert difference([10 * expected + 0.25], [10 * expected]) == pytest.approx(0.025)
    assert difference([expected], [expected]) == 0
    assert difference([expected, expected + 1], [expected, expected]) == 1


def test_a_constant_output_has_its_size_as_the_scale() -> None:
    constant = torch.full((4, 2), 8.0, dtype=torch.float64)
    assert difference([constant + 2], [constant]) == pytest.approx(0.25)
    assert difference([torch.full((4, 2), 0.5)], [torch.zeros(4, 2)]) == 0.5


@pytest.mark.parametrize(
    ("found", "expected", "off"),
    [
        ([1.0, math.inf], [1.0, 2.0], math.inf),
        ([1.0, math.nan], [1.0, 2.0], math.inf),
        ([1.0, 2.0], [1.0, math.inf], math.inf),
        ([1.0, 2.0, math.inf], [1.0, 2.0, math.inf], 0.0),
        ([1.0, 2.0, math.nan], [1.0, 2.0, math.nan], 0.0),
        ([1.0, 2.0, 3.0], [1.0, 2.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_values_that_are_not_finite_and_other_shapes(found: list[float], expected: list[float], off: float) -> None:
    assert difference([torch.tensor(found)], [torch.tensor(expected)]) == off


def test_rounding_explains_four_times_its_own_error() -> None:
    assert within(0.1, 1e-4) == pytest.approx(0.4)
    assert within(1e-6, 1e-4) == 1e-4
    assert within(0.6, 1e-4) == math.inf  # nothing is left to compare


def test_the_image_that_differs_most() -> None:
    plain = torch.zeros(3, 2)
    found = plain.clone()
    found[1] = 1
    assert most_different([found], [plain]) == 1
    found[2, 0] = math.nan
    assert most_different([found], [plain]) == 2


def test_inputs_of_layers_come_in_the_order_of_calls_and_hooks_go() -> None:
    network = sound_network()
    x = torch.randn(2, 3, 8, 8)
    inputs: dict[str, Tensor] = layer_inputs(network, {"4": None, "1": None}, lambda: network(x))
    assert [*inputs] == ["1", "4"]
    assert torch.equal(inputs["1"], network[0](x).double())
    assert not any(module._forward_pre_hooks for module in network)
