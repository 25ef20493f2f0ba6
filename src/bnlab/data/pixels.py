"""From a file to the pixels a network sees. Training's evaluation, `evaluate` and `predict` share `prepare`."""

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field

from bnlab.config import Positive
from bnlab.errors import PhotoError

if TYPE_CHECKING:
    import torch

Pixels = NDArray[np.uint8]

# Twice Pillow's own warning limit, where it raises: a file of a few kilobytes can claim gigabytes of pixels.
MAX_PIXELS = 178_956_970


@dataclass(frozen=True, kw_only=True)
class View:
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


def open_photo(path: str | Path) -> Image.Image:
    """The photo as upright 8-bit RGB.

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


def prepare(image: Image.Image, view: View) -> Pixels:
    """The square a network sees in evaluation: `view.size` x `view.size` x 3."""
    if view.resize == "squash":
        box = (0.0, 0.0, float(image.width), float(image.height))
    else:
        side = min(image.width, image.height) * view.crop_fraction
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
    return _resized(image, view.size, box)


def augment(
    image: Image.Image,
    size: int,
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
    flip: float,
    random: np.random.Generator,
) -> Pixels:
    """A random part of the photo as a square of `size` x `size` x 3 pixels, mirrored with chance `flip`.

    The part has a share of the photo's area uniform in `area`, and an aspect (width to height) log-uniform in `aspect`.
    When ten tries do not fit in the photo, the largest centred part of a permitted aspect is taken, as in torchvision.
    """
    pixels = _resized(image, size, _random_box(image.width, image.height, area, aspect, random))
    return np.ascontiguousarray(pixels[:, ::-1]) if random.random() < flip else pixels


def normalise(images: "torch.Tensor", view: View) -> "torch.Tensor":
    """uint8 N x H x W x 3 to float32 N x 3 x H x W, (x / 255 - mean) / std by channel, channels last in memory."""
    import torch

    mean = torch.tensor(view.mean, device=images.device) * 255
    std = torch.tensor(view.std, device=images.device) * 255
    return images.float().sub_(mean).div_(std).permute(0, 3, 1, 2)  # N x 3 x H x W


def _resized(image: Image.Image, size: int, box: tuple[float, float, float, float]) -> Pixels:
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def _random_box(
    width: int, height: int, area: tuple[float, float], aspect: tuple[float, float], random: np.random.Generator
) -> tuple[float, float, float, float]:
    for _ in range(10):
        target = width * height * random.uniform(*area)
        ratio = np.exp(random.uniform(np.log(aspect[0]), np.log(aspect[1])))
        w, h = round(np.sqrt(target * ratio)), round(np.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.integers(0, width - w + 1), random.integers(0, height - h + 1)
            return (float(left), float(top), float(left + w), float(top + h))
    ratio = min(max(width / height, aspect[0]), aspect[1])
    w, h = min(float(width), height * ratio), min(float(height), width / ratio)
    return ((width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2)


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
