"""From a file to the pixels a network sees. Training's evaluation, `evaluate` and `predict` share `preprocess`."""

import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field

from bnlab.errors import PhotoError
from bnlab.recipe import Colour, Positive

if TYPE_CHECKING:
    import torch

Pixels = NDArray[np.uint8]

# Twice Pillow's own warning limit, where it raises: a file of a few kilobytes can claim gigabytes of pixels.
MAX_PIXELS = 178_956_970


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a network sees a photo in evaluation. It travels in the classifier file, which is held to its bounds."""

    size: Annotated[int, Field(ge=1, le=8192)]
    """side of the square, in pixels"""
    resize: Literal["squash", "crop"]
    """"squash": both sides to `size`; "crop": the short side, then the centre"""
    crop_fraction: Annotated[float, Field(gt=0, le=1)]
    """"crop": share of the short side that is kept"""
    mean: tuple[float, float, float]
    """of each channel (RGB, in 0..1), subtracted"""
    std: tuple[Positive, Positive, Positive]
    """of each channel, divided by"""
    interpolation: Literal["bilinear"] = "bilinear"
    """Pillow's filter, which averages over all it shrinks"""
    flip_tta: bool = False
    """whether the answers for the photo and its mirror image are averaged"""


def open_photo(path: str | Path, at_least: int = 0) -> Image.Image:
    """The photo as upright 8-bit RGB.

    A JPEG may be decoded at a half, a quarter or an eighth of its size, which is quick, where `at_least` says that no
    side needs more pixels than that.

    EXIF orientation is honoured; 16-bit pixels are scaled to 8 bits; palette, grey and CMYK are converted; what is
    transparent becomes white; of an animation the first frame counts.

    Raises:
        PhotoError: the file is empty, broken, no picture, too large, or may not be read.
    """
    name = str(path)
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise PhotoError(name, "it is no regular file")
        if status.st_size == 0:
            raise PhotoError(name, "the file is empty (0 bytes)")
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _too_large(name, f"{image.width} x {image.height} pixels")
            if at_least:
                image.draft(None, (at_least, at_least))
            image.load()
            return _to_rgb(name, _upright(image))
    except PhotoError:
        raise
    except FileNotFoundError:
        raise PhotoError(name, "there is no such file", "check the path") from None
    except PermissionError:
        raise PhotoError(name, "it may not be read (permission denied)", "change its permissions") from None
    except Image.DecompressionBombError:
        raise _too_large(name, "its pixels") from None
    except UnidentifiedImageError:
        if Path(name).suffix.lower() in (".heic", ".heif"):
            raise PhotoError(name, "HEIC pictures are not read", "save it as JPEG") from None
        raise PhotoError(name, "it is no picture Pillow can read") from None
    except (
        Exception
    ) as error:  # decoders raise whatever they please at broken files: OSError, SyntaxError, zlib.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        if "truncated" in reason:
            raise PhotoError(name, "the file breaks off early (truncated)") from None
        raise PhotoError(name, f"the picture is broken ({reason})") from None


def shrunk(image: Image.Image, side: int) -> Pixels:
    """The photo with a short side of at most `side`, H x W x 3; one that is smaller stays as it is."""
    scale = side / min(image.width, image.height)
    if scale < 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    return np.array(image)  # a copy: Pillow's own may not be written to, and torch warns of such


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """The square a network sees in evaluation: `preprocessing.size` x `preprocessing.size` x 3."""
    if preprocessing.resize == "squash":
        box = (0.0, 0.0, float(image.width), float(image.height))
    else:
        side = min(image.width, image.height) * preprocessing.crop_fraction
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
    return square(image, preprocessing.size, box)


def square(image: Image.Image, size: int, box: tuple[float, float, float, float]) -> Pixels:
    """What is in the box (left, top, right, bottom, in pixels) as `size` x `size` x 3, averaged over all it shrinks."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def normalise(images: "torch.Tensor", preprocessing: Preprocessing) -> "torch.Tensor":
    """uint8 N x H x W x 3 to float32 N x 3 x H x W, (x / 255 - mean) / std by channel, channels last in memory."""
    mean, std = _colours(preprocessing.mean, preprocessing.std, str(images.device))
    return images.float().sub_(mean).div_(std).permute(0, 3, 1, 2)  # N x 3 x H x W


@lru_cache(maxsize=64)
def _colours(mean: Colour, std: Colour, device: str) -> "tuple[torch.Tensor, torch.Tensor]":
    """On the device, where they stay: to bring them there, a GPU would have to be waited for."""
    import torch

    with torch.inference_mode(False):
        return torch.tensor(mean, device=device) * 255, torch.tensor(std, device=device) * 255


def _too_large(name: str, what: str) -> PhotoError:
    limit = MAX_PIXELS // 1_000_000
    return PhotoError(name, f"{what} are more than the {limit} million that are safe to open", "scale it down")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a camera's broken metadata does not make its pixels unusable
        return image


def _to_rgb(name: str, image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _from_integers(name, np.asarray(image))
    if image.mode == "F":
        raise PhotoError(name, "its floating-point pixels have no known range", "save it with 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, rgba).convert("RGB")
    return image.convert("RGB")


def _from_integers(name: str, values: NDArray[Any]) -> Image.Image:
    """Pillow's own conversion would cut 16-bit values off at 255."""
    if values.min() < 0 or values.max() > 65535:
        raise PhotoError(name, "its 32-bit pixels have no known range", "save it with 8 or 16 bits")
    return Image.fromarray((values / 257 + 0.5).astype(np.uint8)).convert("RGB")
