"""From a photo to the pixels that a network sees in evaluation.

There is one preprocessing. Training's validation, recalibration, `evaluate` and `predict` all read their photos through
`loader.preprocessed_batches`, which calls `PhotoReader.open` and `tta_crops` (one crop: `preprocess`), and the
classifier then calls `normalise` on the device. The settings (`Preprocessing`) are stored in the classifier file.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from bnlab.errors import UsageError
from bnlab.recipe import Colour, PixelRange, Positive

if TYPE_CHECKING:
    import torch

Pixels = NDArray[np.uint8]
Crops = Literal[1, 10, 144]
"""Number of crops of a photo in test-time augmentation, mirror images counted."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How evaluation turns a photo into the network's input. A classifier file is checked against these bounds."""

    size: Annotated[int, Field(ge=1, le=8192)]
    """width and height of the network's input, in pixels"""
    resize: Literal["squash", "crop"]
    """"squash" scales width and height to `size`; "crop" takes the centre square and scales that"""
    crop_fraction: Annotated[float, Field(gt=0, le=1)]
    """"crop": length of the centre square, as a fraction of the photo's short side"""
    mean: tuple[float, float, float]
    """subtracted from each channel (RGB, in 0..1)"""
    std: tuple[Positive, Positive, Positive]
    """divides each channel after that"""
    interpolation: Literal["bilinear"] = "bilinear"
    """Pillow's filter, which averages over all pixels when it scales down"""
    flip_tta: bool = False
    """whether the probabilities for the photo and its mirror image are averaged"""
    pixel_range: PixelRange | None = None
    """values that are black and white in pictures of more than 8 bits a channel; None takes the file's own range"""


def pre_resize(image: Image.Image, short_side: int) -> Pixels:
    """Scale a photo down to a short side of `short_side` pixels, H x W x 3. A smaller photo keeps its size."""
    scale = short_side / min(image.width, image.height)
    if scale < 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    return np.array(image)  # a copy: Pillow's own pixels are read-only, and torch warns of such


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """The square that a network sees in evaluation: `size` x `size` x 3."""
    if preprocessing.resize == "squash":
        return _resize(image, preprocessing.size)
    return _square_of(image, preprocessing.size, fraction=preprocessing.crop_fraction)


def images_per_photo(crops: Crops) -> int:
    """Number of images that `tta_crops` makes of a photo: mirror images are not made, so 10 gives 5 and 144 gives 72.

    Raises:
        UsageError: the papers use no such number of crops.
    """
    numbers = {1: 1, 10: 5, 144: 72}
    if crops not in numbers:
        raise UsageError(f"crops {crops} is not valid", f"use {', '.join(map(str, numbers))}")
    return numbers[crops]


def tta_crops(image: Image.Image, preprocessing: Preprocessing, crops: Crops) -> Pixels:
    """The crops of a photo for test-time augmentation: uint8 K x `size` x `size` x 3, K = `images_per_photo(crops)`.

    - 1: `preprocess`.
    - 10 (Krizhevsky et al. 2012, sec. 4.1): the centre square of the photo, scaled to 8/7 of the size (256 pixels for
      224); of it the four corners and the centre; and their mirror images.
    - 144 (Szegedy et al. 2015, Going Deeper with Convolutions, sec. 7): the photo scaled to short sides of 8, 9, 10 and
      11 sevenths of the size; of each the left, centre and right square (of a tall photo the top, centre and bottom
      one); of each square the four corners, the centre and the square itself scaled to the size; and their mirror
      images: 4 x 3 x 6 x 2. The three squares of a square photo are the same.

    Mirror images are not made here: the classifier flips the network's input. With 10 and 144 the photo keeps its
    proportions, as in the papers, whatever `resize` and `crop_fraction` are. A photo that is too small is enlarged.

    Raises:
        UsageError: the papers use no such number of crops.
    """
    images_per_photo(crops)
    size = preprocessing.size
    if crops == 1:
        return preprocess(image, preprocessing)[None]  # 1 x size x size x 3
    if crops == 10:
        return np.stack(_corners_and_centre(_square_of(image, round(size * 8 / 7)), size))  # 5 x size x size x 3
    images: list[Pixels] = []
    for sevenths in (8, 9, 10, 11):
        for position in (0.0, 0.5, 1.0):
            square = _square_of(image, round(size * sevenths / 7), position)  # length x length x 3
            images += _corners_and_centre(square, size)
            images.append(_resize(Image.fromarray(square), size))
    return np.stack(images)  # 72 x size x size x 3


def normalise(images: "torch.Tensor", preprocessing: Preprocessing) -> "torch.Tensor":
    """Subtract the mean and divide by the standard deviation: (x / 255 - mean) / std for each channel.

    `images` is uint8 N x H x W x 3; the result is float32 N x 3 x H x W, channels last in memory, on the same device.
    """
    mean, std = _mean_and_std(preprocessing.mean, preprocessing.std, str(images.device))
    return images.float().sub_(mean).div_(std).permute(0, 3, 1, 2)  # N x 3 x H x W


@lru_cache(maxsize=64)
def _mean_and_std(mean: Colour, std: Colour, device: str) -> "tuple[torch.Tensor, torch.Tensor]":
    """Both times 255, kept on the device: to copy them there for each batch would wait for a GPU."""
    import torch

    with torch.inference_mode(False):
        return torch.tensor(mean, device=device) * 255, torch.tensor(std, device=device) * 255


def _resize(image: Image.Image, size: int, box: tuple[float, float, float, float] | None = None) -> Pixels:
    """The part within the box (left, top, right, bottom, in pixels; default: all), scaled to `size` x `size` x 3."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def _square_of(image: Image.Image, size: int, position: float = 0.5, fraction: float = 1.0) -> Pixels:
    """A square of the photo, scaled to `size` x `size` x 3.

    Its length is a fraction of the photo's short side. `position` is where it lies along the long side: 0 at its start,
    1 at its end. It is cut before it is scaled. The result is the same, and a photo that is a thousand times as wide as
    high needs no more memory.
    """
    length = min(image.width, image.height) * fraction
    left, top = (image.width - length) * position, (image.height - length) * position
    return _resize(image, size, (left, top, left + length, top + length))


def _corners_and_centre(pixels: Pixels, size: int) -> list[Pixels]:
    end = len(pixels) - size
    corners = ((0, 0), (0, end), (end, 0), (end, end), (end // 2, end // 2))
    return [pixels[top : top + size, left : left + size] for top, left in corners]  # size x size x 3 each
