"""The new weights against the two layers, one after the other."""

import pytest
import torch
from torch import nn

from bnlab.norm.folding.flow import CannotFold
from bnlab.norm.folding.weights import Affine, exact, fold_into, fold_into_next, widths


def affine(channels: int) -> Affine:
    torch.manual_seed(0)
    return Affine(*torch.randn(3, channels, dtype=torch.float64))


def applied(one: Affine, x: torch.Tensor) -> torch.Tensor:
    scale, mean, beta = (value.view(-1, *[1] * (x.ndim - 2)) for value in one)
    return (x - mean) * scale + beta


LAYERS = [
    (lambda: nn.Linear(4, 6), (5, 4)),
    (lambda: nn.Conv1d(4, 6, 2, groups=2, bias=False), (2, 4, 5)),
    (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    (lambda: nn.Conv3d(4, 6, 1), (2, 4, 3, 3, 3)),
    (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
]


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_into_the_layer_before(make, shape) -> None:
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    one = affine(widths([layer]))
    expected = applied(one, layer(x))
    fold_into([layer], one, {layer: "layer"})
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("make", "shape"), LAYERS[:-1])
def test_into_the_layer_after(make, shape) -> None:
    layer, x, one = make().double(), torch.randn(shape, dtype=torch.float64), affine(4)
    expected = layer(applied(one, x))
    fold_into_next([layer], one, {layer: "layer"})
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fold", [fold_into, fold_into_next])
def test_what_does_not_fit_changes_nothing(fold) -> None:
    layer = nn.Linear(3, 3)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    infinite = affine(3)
    infinite.scale[1] = torch.inf
    for bad, reason in ((affine(4), "it is for 4 channels"), (infinite, "its scale or shift is not finite")):
        with pytest.raises(CannotFold, match=reason):
            fold([layer], bad, {layer: "layer"})
    half = nn.Linear(3, 3).half()
    with pytest.raises(CannotFold, match="the weights of layer would not be finite"):
        fold([half], Affine(*(1e6 * value for value in affine(3))), {half: "layer"})
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_exact_is_float64_without_gradient() -> None:
    found = exact(nn.Parameter(torch.ones(2, dtype=torch.bfloat16)))
    assert found.dtype == torch.float64 and not found.requires_grad
