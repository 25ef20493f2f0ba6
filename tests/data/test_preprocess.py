from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bnlab.data.preprocess import (
    Pixels,
    Preprocessing,
    images_per_photo,
    normalise,
    pre_resize,
    preprocess,
    tta_crops,
)
from bnlab.errors import UsageError

RED, GREEN = (250, 20, 10), (10, 200, 30)


def preprocessing(size: int = 32, resize: Any = "crop", crop_fraction: float = 1.0, **changes: Any) -> Preprocessing:
    return Preprocessing(
        size=size, resize=resize, crop_fraction=crop_fraction, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5), **changes
    )


def halves(width: int = 60, height: int = 40) -> Image.Image:
    """The left half is red, the right one green."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(GREEN, (width // 2, 0, width, height))
    return image


@pytest.mark.parametrize(("size", "expected"), [((60, 40), (20, 30, 3)), ((10, 15), (15, 10, 3))])
def test_pre_resize_scales_the_short_side_down_and_never_up(
    size: tuple[int, int], expected: tuple[int, int, int]
) -> None:
    pixels = pre_resize(halves(*size), 20)
    assert pixels.shape == expected
    assert pixels.flags.writeable


def test_squash_keeps_everything_and_crop_the_centre() -> None:
    image = Image.new("RGB", (90, 30), RED)
    image.paste(GREEN, (30, 0, 60, 30))
    squashed = preprocess(image, preprocessing(30, "squash"))
    assert squashed.shape == (30, 30, 3)
    assert tuple(squashed[15, 2]) == RED
    assert tuple(squashed[15, 15]) == GREEN
    assert (preprocess(image, preprocessing(32, "crop")) == np.array(GREEN)).mean() > 0.9
    assert (preprocess(image, preprocessing(32, "crop", 0.5)) == np.array(GREEN)).all()


def test_normalise_subtracts_the_mean_and_divides_by_the_deviation() -> None:
    pixels = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8)
    result = normalise(pixels, preprocessing())
    expected = (pixels.double() / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.25, 0.5])
    assert result.shape == (2, 3, 5, 4)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result.double(), expected.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)


# Where the crops of a photo lie is worked out by hand, on images whose pixels hold their own coordinates.


def coordinates(width: int, height: int) -> Image.Image:
    """Red is a pixel's x, green its y."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def corner(crop: Pixels) -> tuple[int, int]:
    """x and y of the crop's first pixel in the photo."""
    return int(crop[0, 0, 0]), int(crop[0, 0, 1])


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (24, 16, [(4, 0), (6, 0), (4, 2), (6, 2), (5, 1)]),  # 16 is 8/7 of 14: nothing is scaled
        (16, 24, [(0, 4), (2, 4), (0, 6), (2, 6), (1, 5)]),
        (16, 16, [(0, 0), (2, 0), (0, 2), (2, 2), (1, 1)]),
    ],
)
def test_the_ten_crops_of_krizhevsky(width: int, height: int, expected: list[tuple[int, int]]) -> None:
    found = tta_crops(coordinates(width, height), preprocessing(14), 10)
    assert (found.shape, found.dtype) == ((5, 14, 14, 3), np.uint8)
    assert [corner(crop) for crop in found] == expected
    for crop, (x, y) in zip(found, expected, strict=True):
        assert (crop[..., 0] == np.arange(x, x + 14)).all()
        assert (crop[..., 1] == np.arange(y, y + 14)[:, None]).all()


def test_the_squares_of_googlenet_by_hand() -> None:
    """22 is 11/7 of 14, so the last short side is not scaled: its squares lie at 0, 11 and 22 of a width of 44."""
    found = tta_crops(coordinates(44, 22), preprocessing(14), 144)[54:]
    within = [(0, 0), (8, 0), (0, 8), (8, 8), (4, 4)]
    for i, left in enumerate((0, 11, 22)):
        of_square = found[6 * i : 6 * i + 6]
        assert [corner(crop) for crop in of_square[:5]] == [(left + x, y) for x, y in within]
        assert (of_square[5][-1, -1].astype(int) - of_square[5][0, 0])[0] in (20, 21)  # the complete square, scaled
        assert of_square[5][..., 0].mean() == pytest.approx(left + 10.5, abs=0.5)


@pytest.mark.parametrize("tall", [False, True])
def test_each_of_the_72_crops_lies_where_the_paper_has_it(tall: bool) -> None:
    """On ramps the mean of a crop is the position of its centre, and its range is how far it was scaled."""
    found = tta_crops(coordinates(110, 220) if tall else coordinates(220, 110), preprocessing(14), 144)
    assert found.shape == (72, 14, 14, 3)
    along, across = (1, 0) if tall else (0, 1)
    number = 0
    for length in (16, 18, 20, 22):
        for start in (0, 55, 110):
            last = length - 14
            if tall:
                corners = [(0, 0), (0, last), (last, 0), (last, last), (last // 2, last // 2)]  # (along, across)
            else:
                corners = [(0, 0), (last, 0), (0, last), (last, last), (last // 2, last // 2)]
            pixel = 110 / length
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


def test_crops_equal_scaling_the_photo_and_cutting_it() -> None:
    """Against the plain way: the photo is scaled to each short side, and then sliced."""
    image = noise(120, 60)
    expected = []
    for short_side in (64, 72, 80, 88):  # for 56
        scaled = np.asarray(image.resize((2 * short_side, short_side), Image.Resampling.BILINEAR))
        for left in (0, short_side // 2, short_side):
            square = scaled[:, left : left + short_side]
            end = short_side - 56
            for y, x in ((0, 0), (0, end), (end, 0), (end, end), (end // 2, end // 2)):
                expected.append(square[y : y + 56, x : x + 56])
            expected.append(np.asarray(Image.fromarray(square).resize((56, 56), Image.Resampling.BILINEAR)))
    found = tta_crops(image, preprocessing(56), 144)
    assert (found == np.stack(expected)).all()
    assert (tta_crops(image, preprocessing(56), 10) == found[6:11]).all()  # the centre square at 8/7


def test_crops_and_their_mirror_images_all_differ() -> None:
    for number in (10, 144):
        found = tta_crops(noise(90, 60), preprocessing(28), number)  # type: ignore[arg-type]
        assert len({crop.tobytes() for crop in [*found, *found[:, :, ::-1]]}) == number


def test_the_three_squares_of_a_square_photo_are_the_same() -> None:
    found = tta_crops(noise(50, 50), preprocessing(28), 144).reshape(4, 3, 6, 28, 28, 3)
    assert (found == found[:, :1]).all()
    assert len({crop.tobytes() for crop in found.reshape(72, 28, 28, 3)}) == 24


@pytest.mark.parametrize("number", [10, 144])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 2), (2, 3), (5000, 1), (1, 5000)])
def test_photos_smaller_than_a_crop_are_enlarged(number: Any, width: int, height: int) -> None:
    found = tta_crops(Image.new("RGB", (width, height), (9, 99, 199)), preprocessing(32), number)
    assert found.shape == (number // 2, 32, 32, 3)
    assert (found == (9, 99, 199)).all()


def test_crops_of_an_enlarged_photo_keep_their_positions() -> None:
    """Of a black and a white pixel the left square is black, the right one white, and the centre has both."""
    two = Image.fromarray(np.array([[[0] * 3, [255] * 3]], dtype=np.uint8))
    means = tta_crops(two, preprocessing(28), 144).reshape(4, 3, 6, -1).mean((0, 2, 3))
    assert means[0] < 60
    assert means[1] == pytest.approx(127.5, abs=2)
    assert means[2] > 195


def test_a_very_wide_photo_and_a_network_of_one_pixel() -> None:
    """At a short side of 44 the wide photo would be 4.4 million pixels wide, if it were scaled before it is cut."""
    assert tta_crops(noise(100_000, 1), preprocessing(28), 144).shape == (72, 28, 28, 3)
    assert tta_crops(noise(5, 4), preprocessing(1), 144).shape == (72, 1, 1, 3)


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_one_crop_is_what_preprocess_makes(resize: str) -> None:
    image, how = noise(50, 30), preprocessing(28, resize, 0.9)
    found = tta_crops(image, how, 1)
    assert found.shape == (1, 28, 28, 3)
    assert (found[0] == preprocess(image, how)).all()


def test_the_papers_crops_ignore_the_settings_of_one_crop() -> None:
    image, squash = noise(50, 30), preprocessing(28, "squash", 0.9, flip_tta=True)
    assert (tta_crops(image, squash, 10) == tta_crops(image, preprocessing(28), 10)).all()


def test_a_number_of_crops_that_no_paper_has_is_refused() -> None:
    wrong: Any = 12
    assert [images_per_photo(number) for number in (1, 10, 144)] == [1, 5, 72]  # type: ignore[arg-type]
    for call in (lambda: images_per_photo(wrong), lambda: tta_crops(noise(5, 5), preprocessing(4), wrong)):
        with pytest.raises(UsageError, match=r"crops 12 .*1, 10, 144"):
            call()
