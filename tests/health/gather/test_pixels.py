import numpy as np
import pytest
import torch

from bnlab.health.gather.pixels import CONVENTIONS, changes, describe_pixels
from tests.health.checks.photos import normalised, photos


def test_a_change_turns_one_convention_into_another() -> None:
    pixels = photos(8)
    name, found = changes(describe_pixels([normalised(pixels)]))
    assert name == "pixels from 0 to 1 with ImageNet's mean and std"
    by_name = {change.name: change for change in found}
    torch.testing.assert_close(
        by_name["pixels from 0 to 255"].apply(normalised(pixels)), 255 * pixels, rtol=1e-5, atol=1e-3
    )
    swapped = by_name["pixels from 0 to 1, with red and blue swapped"]
    torch.testing.assert_close(swapped.apply(normalised(pixels)), pixels.flip(1))
    assert len(found) == len({change.key for change in found}) and not any(change.is_none for change in found)


@pytest.mark.parametrize("unit", [1, 255])
def test_takes_the_mean_and_std_of_the_caller(unit: int) -> None:
    pixels = photos(8)
    name, found = changes(describe_pixels([(pixels - 0.3) / 0.2]), [0.3 * unit] * 3, [0.2 * unit] * 3)
    assert name == "images with the given mean and std"
    back = next(change for change in found if change.name == "pixels from 0 to 1")
    torch.testing.assert_close(back.apply((pixels - 0.3) / 0.2), pixels)


def test_applies_or_undoes_conventions_if_none_explains_the_values() -> None:
    pixels = photos(8)
    name, found = changes(describe_pixels([normalised(normalised(pixels))]))
    assert name == "no usual convention"
    undone = next(c for c in found if c.name == f"the same before {CONVENTIONS[2].name}")
    torch.testing.assert_close(undone.apply(normalised(normalised(pixels))), normalised(pixels))


def test_describes_all_images() -> None:
    low, high = describe_pixels([torch.zeros(1, 3, 2, 2), torch.full((2, 3, 2, 2), 5.0)])
    assert np.array_equal(low, [0, 0, 0]) and np.array_equal(high, [5, 5, 5])


@pytest.mark.parametrize(("unit", "scale"), [(1, 255), (255, 1)])
def test_sees_that_the_mean_and_std_are_of_another_range_than_the_pixels(unit: int, scale: int) -> None:
    pixels, mean, std = photos(8), torch.tensor([0.5, 0.45, 0.4]), torch.tensor([0.2, 0.25, 0.22])
    wrong = (scale * pixels - unit * mean.view(3, 1, 1)) / (unit * std.view(3, 1, 1))
    name, found = changes(describe_pixels([wrong]), (unit * mean).tolist(), (unit * std).tolist())
    assert name.startswith(f"pixels from 0 to {scale} with the given mean and std")
    back = next(change for change in found if change.name == "pixels from 0 to 1")
    torch.testing.assert_close(back.apply(wrong), pixels, rtol=1e-4, atol=1e-4)
