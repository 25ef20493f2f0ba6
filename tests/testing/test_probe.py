"""The shapes, copies and comparisons that the checks of a layer are made with."""

import pytest
import torch
from torch import Tensor, nn

from bnlab import norm
from bnlab.errors import UsageError
from bnlab.testing import check_norm_layer, norm_layer_checks
from bnlab.testing.probe import CheckError, Probe, random_values
from tests.norm.subclasses import AnyShape
from tests.testing.layers import ByHand


class Flat(ByHand):
    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 2:
            raise RuntimeError("it takes N x C")
        return super().forward(x)


class Sequences(ByHand):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (7,):
            raise RuntimeError("it takes N x C x 7")
        return super().forward(x)


def probe(layer: nn.Module, shape: tuple[int, ...] | None = None) -> Probe:
    return Probe(layer, shape, None)


@pytest.mark.parametrize(
    ("layer", "dimensions"),
    [
        (nn.BatchNorm1d(5), 2),
        (norm.BatchNorm2d(5), 4),
        (nn.BatchNorm3d(5), 5),
        (norm.SyncBatchNorm(5), 4),
        (AnyShape(5), 4),
        (Flat(5), 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_the_shape_follows_from_the_class_or_is_tried(layer: nn.Module, dimensions: int) -> None:
    found = probe(layer)
    assert len(found.shape) == dimensions
    assert found.shape[1] == 5
    assert found.input().shape == found.shape


def test_a_shape_that_cannot_be_found_is_asked_for() -> None:
    with pytest.raises(UsageError, match=r"RuntimeError with 4\): pass the shape"):
        check_norm_layer(Sequences(5))
    check_norm_layer(Sequences(5), shape=(4, 5, 7), skip=["single_value"])


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (1, 5, 3, 3), (5,), (2, 5, 1, 3)])
def test_a_shape_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="at least 2 images, 5 channels and 8 values a channel"):
        check_norm_layer(nn.BatchNorm2d(5), shape=shape)


def test_a_given_shape_is_used() -> None:
    seen = set()

    class Watched(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            seen.add(tuple(input.shape))
            return super().forward(input)

    check_norm_layer(Watched(5), shape=(3, 5, 2, 4), skip=["pickling", "each_image_alone", "single_value"])
    assert seen == {(3, 5, 2, 4)}


def test_copies_are_random_and_always_the_same() -> None:
    given = probe(nn.BatchNorm2d(5).half())
    one, two = given.copy(training=True), given.copy(training=True)
    for name, values in one.state_dict().items():
        assert values.equal(two.state_dict()[name]), name
        assert values.data_ptr() != two.state_dict()[name].data_ptr()
    assert one.weight.dtype == torch.float32
    assert one.weight.min() < 0 < one.running_var.min()
    small = given.copy(training=False, scale=1e-3, mean=7.0)
    assert not small.training
    assert small.running_var.allclose(1e-6 * one.running_var)
    assert small.running_mean.eq(7).all()


@pytest.mark.parametrize(("off", "close"), [(5e-6, True), (2e-5, False), (torch.nan, False), (torch.inf, False)])
def test_values_are_close_relative_to_the_largest(off: float, close: bool) -> None:
    expected = random_values(0, 4, 5)
    found = expected.clone()
    found[1, 2] += off * expected.abs().max()
    given = probe(nn.BatchNorm1d(5))
    if close:
        given.close(found, expected, "it")
    else:
        with pytest.raises(CheckError, match=f"expected it to be {float(expected[1, 2]):.7g}, found"):
            given.close(found, expected, "it")


def test_where_values_cancel_1_is_the_size() -> None:
    probe(nn.BatchNorm1d(5)).close(torch.full((3,), 9e-6), torch.zeros(3), "it")
    with pytest.raises(CheckError, match=r"by 1\.1e-05"):
        probe(nn.BatchNorm1d(5)).close(torch.full((3,), 1.1e-5), torch.zeros(3), "it")


def test_more_rounding_is_allowed_for_many_values() -> None:
    assert probe(nn.BatchNorm2d(5)).tolerance == 1e-5
    assert probe(nn.BatchNorm2d(5), (20, 5, 100, 200)).tolerance == pytest.approx(2e-4)
    assert probe(nn.BatchNorm2d(5).double()).tolerance == 1e-10


class Kinked(nn.BatchNorm1d):
    """Has another slope close to whole numbers, as if rounding had crossed the kink of a ReLU."""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return torch.where((y - y.round()).abs() < 9e-4, 3 * y, y)


def test_gradients_at_the_kinks_of_activations_are_not_compared() -> None:
    check = norm_layer_checks()["training_gradients"]
    check(Kinked(512), activation=torch.clone)
    with pytest.raises(AssertionError, match="gradient of the input"):
        check(Kinked(512))


def test_shapes_and_types_are_compared_first() -> None:
    with pytest.raises(CheckError, match=r"expected it of shape \[2\], found \[1\]"):
        probe(nn.BatchNorm1d(5)).close(torch.ones(1), torch.ones(2), "it")
    with pytest.raises(CheckError, match="expected it to be a tensor, found tuple"):
        probe(nn.BatchNorm1d(5)).close((torch.ones(2),), torch.ones(2), "it")
