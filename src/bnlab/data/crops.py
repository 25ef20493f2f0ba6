"""The pictures that evaluation takes from one photo: one, or the ten and the 144 of the papers."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from PIL import Image

from bnlab.data.preprocess import Pixels, Preprocessing, preprocess, square
from bnlab.errors import UsageError

Crops = Literal[1, 10, 144]
"""crops of a photo, mirror images counted"""

_PICTURES = {1: 1, 10: 5, 144: 72}  # without the mirror images, which are flipped in the network's input
_SEVENTHS = (8, 9, 10, 11)  # of the network's size: short sides of 256, 288, 320 and 352 for 224


def images_per_photo(number: Crops) -> int:
    """How many pictures `crops` makes of a photo: half of `number`, or the one.

    Raises:
        UsageError: the papers have no such number of crops.
    """
    if number not in _PICTURES:
        raise UsageError(f"crops {number} cannot be", f"say {', '.join(map(str, _PICTURES))}")
    return _PICTURES[number]


def crops(image: Image.Image, preprocessing: Preprocessing, number: Crops) -> Pixels:
    """The crops of a photo, uint8 K x `preprocessing.size` x `preprocessing.size` x 3; K is `images_per_photo(number)`.

    - 1: `preprocess`.
    - 10 (Krizhevsky et al. 2012, sec. 4.1): of the photo's centre square, shrunk to 8/7 of the size (256 pixels for
      224), the four corners and the centre; and their mirror images.
    - 144 (Szegedy et al. 2015, Going Deeper with Convolutions, sec. 7): the photo shrunk to short sides of 8, 9, 10 and
      11 sevenths of the size; of each its left, centre and right square, of a tall photo the top, centre and bottom
      one; of each square the four corners, the centre and the square itself shrunk to the size; and their mirror
      images: 4 x 3 x 6 x 2. Of a square photo the three squares are one.

    The mirror images are not made: the network's input is flipped. 10 and 144 keep the photo's proportions, whatever
    `preprocessing.resize` and `preprocessing.crop_fraction` say, as the papers do; a photo that is smaller is enlarged.

    Raises:
        UsageError: the papers have no such number of crops.
    """
    images_per_photo(number)
    if number == 1:
        return preprocess(image, preprocessing)[None]  # 1 x size x size x 3
    if number == 10:
        return np.stack(
            list(_corners_and_centre(_square_at(image, 0.5, _SEVENTHS[0], preprocessing), preprocessing))
        )  # 5 x ...
    made: list[Pixels] = []
    for sevenths in _SEVENTHS:
        for place in (0.0, 0.5, 1.0):
            pixels = _square_at(image, place, sevenths, preprocessing)  # side x side x 3
            made += _corners_and_centre(pixels, preprocessing)
            made.append(
                square(Image.fromarray(pixels), preprocessing.size, (0.0, 0.0, float(len(pixels)), float(len(pixels))))
            )
    return np.stack(made)  # 72 x size x size x 3


def _square_at(image: Image.Image, place: float, sevenths: int, preprocessing: Preprocessing) -> Pixels:
    """A square as high or wide as the photo, `place` (0..1) of the way along it, shrunk to `sevenths` of the size.

    From the photo itself and not from all of it shrunk: that is the same, and of a photo that is a thousand times as
    wide as high it takes no more memory.
    """
    short = min(image.width, image.height)
    left, top = (image.width - short) * place, (image.height - short) * place
    return square(image, round(preprocessing.size * sevenths / 7), (left, top, left + short, top + short))


def _corners_and_centre(pixels: Pixels, preprocessing: Preprocessing) -> Iterator[Pixels]:
    end = len(pixels) - preprocessing.size
    middle = end // 2
    for top, left in ((0, 0), (0, end), (end, 0), (end, end), (middle, middle)):
        yield pixels[top : top + preprocessing.size, left : left + preprocessing.size]  # size x size x 3
