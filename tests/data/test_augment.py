from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bnlab.data.augment import augment, jitter_colors, random_crop_box
from bnlab.data.preprocess import Preprocessing, preprocess

crop_of = partial(augment, color_jitter=0)


def test_augmented_crops_stay_within_their_bounds() -> None:
    """The colour of each pixel is its position, which shows where a crop was taken."""
    y, x = np.mgrid[0:120, 0:200]
    image = np.stack([x, y, np.zeros_like(x)], 2).astype(np.uint8)
    areas, flips = [], 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        crop = crop_of(image, 64, area=(0.2, 0.5), aspect=(0.75, 4 / 3), flip=0.5, random=random).astype(float)
        width, height = np.ptp(crop[..., 0]) + 1, np.ptp(crop[..., 1]) + 1
        areas.append(width * height / (120 * 200))
        flips += crop[0, 0, 0] > crop[0, -1, 0]
        assert 0.7 < width / height < 1.4
    assert min(areas) < 0.25
    assert max(areas) > 0.42
    assert 0.17 < min(areas) < max(areas) < 0.53
    assert 70 < flips < 130


@pytest.mark.parametrize(("width", "height", "box"), [(400, 10, (194, 0, 205, 10)), (10, 400, (0, 194, 10, 205))])
def test_an_impossible_crop_falls_back_to_the_centre(width: int, height: int, box: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    assert random_crop_box(width, height, (1.0, 1.0), (10 / 11, 1.1), random) == box
    crop = crop_of(
        np.zeros((height, width, 3), dtype=np.uint8), 32, area=(1.0, 1.0), aspect=(0.9, 1.1), flip=0, random=random
    )
    assert crop.shape == (32, 32, 3)


def test_a_crop_of_all_without_flip_is_the_photo() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    crop = crop_of(image, 32, area=(1.0, 1.0), aspect=(1.0, 1.0), flip=0, random=np.random.default_rng(0))
    preprocessing = Preprocessing(size=32, resize="squash", crop_fraction=1.0, mean=(0, 0, 0), std=(1, 1, 1))
    assert (
        np.abs(crop.astype(int) - preprocess(Image.fromarray(image), preprocessing)).max() <= 1
    )  # Pillow's, to rounding
    mirrored = crop_of(image, 32, area=(1.0, 1.0), aspect=(1.0, 1.0), flip=1, random=np.random.default_rng(0))
    assert (mirrored == crop[:, ::-1]).all()


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 10_000))
@settings(max_examples=50)
def test_boxes_lie_within_the_photo(width: int, height: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    left, top, right, bottom = random_crop_box(width, height, (0.05, 1.0), (0.5, 2.0), random)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_colours_vary_by_at_most_the_strength() -> None:
    grey = np.full((8, 8, 3), 100, dtype=np.uint8)  # which neither contrast nor saturation changes
    found = [int(jitter_colors(grey, 0.3, np.random.default_rng(seed))[0, 0, 0]) for seed in range(200)]
    assert 69 <= min(found) < 75
    assert 125 < max(found) <= 131
    assert (jitter_colors(grey, 1e-9, np.random.default_rng(0)) == grey).all()
    random = np.random.default_rng(0)
    photo = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    spread = [float(jitter_colors(photo, 0.5, np.random.default_rng(seed)).std()) for seed in range(50)]
    assert min(spread) < 0.8 * photo.std()
    assert max(spread) > 1.1 * photo.std()
