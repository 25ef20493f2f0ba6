"""Where the crops of a photo lie, worked out by hand on pictures whose pixels say where they are."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from bnlab.data.crops import crops, images_per_photo
from bnlab.data.preprocess import Pixels, Preprocessing, preprocess
from bnlab.errors import UsageError


def preprocessing(size: int, resize: Any = "crop", *, mirror: bool = False) -> Preprocessing:
    return Preprocessing(size=size, resize=resize, crop_fraction=0.9, mean=(0, 0, 0), std=(1, 1, 1), flip_tta=mirror)


def coordinates(width: int, height: int) -> Image.Image:
    """Red is a pixel's x, green its y."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def corner(crop: Pixels) -> tuple[int, int]:
    """x and y of its first pixel in the photo."""
    return int(crop[0, 0, 0]), int(crop[0, 0, 1])


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (24, 16, [(4, 0), (6, 0), (4, 2), (6, 2), (5, 1)]),  # 16 is 8/7 of 14: nothing is scaled
        (16, 24, [(0, 4), (2, 4), (0, 6), (2, 6), (1, 5)]),
        (16, 16, [(0, 0), (2, 0), (0, 2), (2, 2), (1, 1)]),
    ],
)
def test_the_ten_of_krizhevsky(width: int, height: int, expected: list[tuple[int, int]]) -> None:
    found = crops(coordinates(width, height), preprocessing(14), 10)
    assert (found.shape, found.dtype) == ((5, 14, 14, 3), np.uint8)
    assert [corner(crop) for crop in found] == expected
    for crop, (x, y) in zip(found, expected, strict=True):
        assert (crop[..., 0] == np.arange(x, x + 14)).all()
        assert (crop[..., 1] == np.arange(y, y + 14)[:, None]).all()


def test_the_squares_of_googlenet_by_hand() -> None:
    """22 is 11/7 of 14, so of the last short side nothing is scaled: squares at 0, 11 and 22 of a width of 44."""
    found = crops(coordinates(44, 22), preprocessing(14), 144)[54:]
    within = [(0, 0), (8, 0), (0, 8), (8, 8), (4, 4)]
    for i, left in enumerate((0, 11, 22)):
        of_square = found[6 * i : 6 * i + 6]
        assert [corner(crop) for crop in of_square[:5]] == [(left + x, y) for x, y in within]
        assert (of_square[5][-1, -1].astype(int) - of_square[5][0, 0])[0] in (20, 21)  # the whole square, shrunk
        assert of_square[5][..., 0].mean() == pytest.approx(left + 10.5, abs=0.5)


@pytest.mark.parametrize("tall", [False, True])
def test_each_of_the_72_is_where_the_paper_has_it(tall: bool) -> None:
    """On ramps the mean of a crop is the place of its middle, and its slope is how far it was shrunk."""
    found = crops(coordinates(110, 220) if tall else coordinates(220, 110), preprocessing(14), 144)
    assert found.shape == (72, 14, 14, 3)
    along, across = (1, 0) if tall else (0, 1)
    number = 0
    for side in (16, 18, 20, 22):
        for start in (0, 55, 110):
            last = side - 14
            if tall:
                corners = [(0, 0), (0, last), (last, 0), (last, last), (last // 2, last // 2)]  # (along, across)
            else:
                corners = [(0, 0), (last, 0), (0, last), (last, last), (last // 2, last // 2)]
            pixel = 110 / side
            for a, b in corners:
                middle = found[number].mean((0, 1))
                assert middle[along] == pytest.approx(start + (a + 7) * pixel - 0.5, abs=1), number
                assert middle[across] == pytest.approx((b + 7) * pixel - 0.5, abs=1), number
                assert np.ptp(found[number][..., along]) == pytest.approx(13 * pixel, abs=3), number
                number += 1
            middle = found[number].mean((0, 1))
            assert middle[along] == pytest.approx(start + 54.5, abs=1)
            assert middle[across] == pytest.approx(54.5, abs=1)
            assert np.ptp(found[number][..., along]) == pytest.approx(13 * 110 / 14, abs=6)
            number += 1
    assert number == 72


def test_it_is_the_photo_shrunk_and_cut() -> None:
    """As one would do it plainly: all of the photo to each short side, then slices."""
    image = noise(120, 60)
    expected = []
    for side in (64, 72, 80, 88):  # of 56
        whole = np.asarray(image.resize((2 * side, side), Image.Resampling.BILINEAR))
        for left in (0, side // 2, side):
            part = whole[:, left : left + side]
            end = side - 56
            for y, x in ((0, 0), (0, end), (end, 0), (end, end), (end // 2, end // 2)):
                expected.append(part[y : y + 56, x : x + 56])
            expected.append(np.asarray(Image.fromarray(part).resize((56, 56), Image.Resampling.BILINEAR)))
    found = crops(image, preprocessing(56), 144)
    assert (found == np.stack(expected)).all()
    centre = found[6:11]  # of 64, which is 8/7: what the ten are of
    assert (crops(image, preprocessing(56), 10) == centre).all()


def test_with_their_mirror_images_they_are_144_different_ones() -> None:
    found = crops(noise(90, 60), preprocessing(28), 144)
    both = [*found, *found[:, :, ::-1]]
    assert len({crop.tobytes() for crop in both}) == 144
    ten = crops(noise(90, 60), preprocessing(28), 10)
    assert len({crop.tobytes() for crop in [*ten, *ten[:, :, ::-1]]}) == 10


def test_of_a_square_photo_the_three_squares_are_one() -> None:
    found = crops(noise(50, 50), preprocessing(28), 144).reshape(4, 3, 6, 28, 28, 3)
    assert (found == found[:, :1]).all()
    assert len({crop.tobytes() for crop in found.reshape(72, 28, 28, 3)}) == 24


@pytest.mark.parametrize("number", [10, 144])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 2), (2, 3), (5000, 1), (1, 5000)])
def test_photos_smaller_than_a_crop_are_enlarged(number: Any, width: int, height: int) -> None:
    found = crops(Image.new("RGB", (width, height), (9, 99, 199)), preprocessing(32), number)
    assert found.shape == (number // 2, 32, 32, 3)
    assert (found == (9, 99, 199)).all()


def test_enlarged_photos_keep_their_places() -> None:
    """A black and a white pixel: the left square is black, the right one white, the centre has both."""
    two = Image.fromarray(np.array([[[0] * 3, [255] * 3]], dtype=np.uint8))
    means = crops(two, preprocessing(28), 144).reshape(4, 3, 6, -1).mean((0, 2, 3))
    assert means[0] < 60
    assert means[1] == pytest.approx(127.5, abs=2)
    assert means[2] > 195


def test_a_wide_photo_takes_no_more_memory() -> None:
    """All of it at a short side of 352 would be 35 million pixels wide."""
    assert crops(noise(100_000, 1), preprocessing(224), 144).shape == (72, 224, 224, 3)


def test_the_smallest_network() -> None:
    assert crops(noise(5, 4), preprocessing(1), 144).shape == (72, 1, 1, 3)


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_one_crop_is_what_prepare_makes(resize: str) -> None:
    image, its_view = noise(50, 30), preprocessing(28, resize)
    found = crops(image, its_view, 1)
    assert found.shape == (1, 28, 28, 3)
    assert (found[0] == preprocess(image, its_view)).all()


def test_the_papers_crops_keep_the_proportions_of_a_photo() -> None:
    """Whatever the view does to it for one crop."""
    image = noise(50, 30)
    assert (crops(image, preprocessing(28, "squash", flip_tta=True), 10) == crops(image, preprocessing(28), 10)).all()


def test_numbers_that_no_paper_has() -> None:
    wrong: Any = 12
    assert [images_per_photo(number) for number in (1, 10, 144)] == [1, 5, 72]  # type: ignore[arg-type]
    for call in (lambda: images_per_photo(wrong), lambda: crops(noise(5, 5), preprocessing(4), wrong)):
        with pytest.raises(UsageError) as error:
            call()
        assert str(error.value) == "crops 12 cannot be: say 1, 10, 144"
