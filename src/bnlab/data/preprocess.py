"""From a photo to the pixels that a network sees in evaluation.

There is one preprocessing. Training's validation, recalibration, `evaluate` and `predict` all read their photos through
`loader.preprocessed_batches`, which calls `open_photo` and `tta_crops` (one crop: `preprocess`), and the classifier
then calls `normalise` on the device. The settings (`Preprocessing`) are stored in the classifier file.
"""

import stat
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field

from bnlab.errors import PhotoError, UsageError
from bnlab.recipe import Colour, Positive

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


def open_photo(path: str | Path, at_least: int = 0) -> Image.Image:
    """Open a photo as upright 8-bit RGB.

    EXIF orientation is honoured; 16-bit pixels are scaled to 8 bits; palette, grey and CMYK images are converted;
    transparent pixels become white; the first frame of an animation is used.

    Args:
        path: file of the photo
        at_least: short side in pixels that the caller needs. A larger JPEG may then be decoded at a half, a quarter or
            an eighth of its size, which is faster. 0 decodes all pixels.

    Raises:
        PhotoError: the file is missing, empty, broken, not an image, too large, or not readable.
    """
    name = str(path)
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise PhotoError(name, "it is not a regular file")
        if status.st_size == 0:
            raise PhotoError(name, "the file is empty (0 bytes)")
        with Image.open(path) as image:
            if at_least:
                image.draft(None, (at_least, at_least))
            image.load()
            upright: Image.Image = image
            with suppress(Exception):  # a camera's broken metadata does not make its pixels unusable
                upright = ImageOps.exif_transpose(image)
            return _to_rgb(name, upright)
    except PhotoError:
        raise
    except FileNotFoundError:
        raise PhotoError(name, "there is no such file", "check the path") from None
    except PermissionError:
        raise PhotoError(name, "it may not be read (permission denied)", "change its permissions") from None
    except Image.DecompressionBombError:  # a file of a few kilobytes can claim gigabytes of pixels
        what = "its pixels are more than the 178 million that are safe to open"
        raise PhotoError(name, what, "scale it down") from None
    except UnidentifiedImageError:
        if Path(name).suffix.lower() in (".heic", ".heif"):
            raise PhotoError(name, "HEIC images are not supported", "save it as JPEG") from None
        raise PhotoError(name, "it is not an image that Pillow can read") from None
    except Exception as error:  # decoders raise anything at broken files: OSError, SyntaxError, zlib.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PhotoError(name, f"the image is broken ({reason})") from None


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


def _to_rgb(name: str, image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise PhotoError(name, "its 32-bit pixels have no known range", "save it with 8 or 16 bits")
        # 16 bits are scaled to 8 here, because Pillow's own conversion would clip them at 255.
        return Image.fromarray((values / 257 + 0.5).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise PhotoError(name, "its floating-point pixels have no known range", "save it with 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, rgba).convert("RGB")
    return image.convert("RGB")
