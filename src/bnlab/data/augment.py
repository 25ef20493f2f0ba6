"""Random changes to the photos of training. Every random number is drawn from the generator that is passed in."""

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch.nn import functional as F

from bnlab.data.preprocess import Pixels

Box = tuple[int, int, int, int]
"""left, top, right, bottom, in pixels"""


def augment(
    photo: Pixels,
    size: int,
    random: np.random.Generator,
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
    flip: float,
    color_jitter: float = 0.0,
) -> Pixels:
    """A random crop of the photo (H x W x 3), scaled to `size` x `size` x 3 and flipped with probability `flip`.

    The crop covers a fraction of the photo's area that is uniform in `area`, with an aspect ratio (width to height)
    that is log-uniform in `aspect`. If ten tries do not fit into the photo, the largest centred crop of a permitted
    aspect ratio is used, as in torchvision. `color_jitter` is described at `jitter_colors`.
    """
    height, width = photo.shape[:2]
    pixels = resize_crop(photo, size, random_crop_box(width, height, area, aspect, random))
    if random.random() < flip:
        pixels = pixels[:, ::-1]
    return jitter_colors(pixels, color_jitter, random) if color_jitter else np.ascontiguousarray(pixels)


def random_crop_box(
    width: int, height: int, area: tuple[float, float], aspect: tuple[float, float], random: np.random.Generator
) -> Box:
    """The crop that `augment` takes from a photo of this width and height."""
    for _ in range(10):
        target = width * height * random.uniform(*area)
        ratio = np.exp(random.uniform(np.log(aspect[0]), np.log(aspect[1])))
        w, h = round(np.sqrt(target * ratio)), round(np.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1))
            return left, top, left + w, top + h
    ratio = min(max(width / height, aspect[0]), aspect[1])
    w, h = max(1, round(min(width, height * ratio))), max(1, round(min(height, width / ratio)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resize_crop(photo: Pixels, size: int, box: Box) -> Pixels:
    """The part of the photo within the box as `size` x `size` x 3, by bilinear interpolation with antialiasing.

    This uses torch and not Pillow as `preprocess` does: it takes a third of the time, and a training crop need not be
    exact. Call it from the thread that trains (the docstring of loader.py says why).
    """
    left, top, right, bottom = box
    if (right - left, bottom - top) == (size, size):
        return photo[top:bottom, left:right]
    part = torch.from_numpy(photo[top:bottom, left:right]).permute(2, 0, 1)[None]  # 1 x 3 x h x w
    square = F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0]  # 3 x size x size
    return square.permute(1, 2, 0).numpy()


def jitter_colors(pixels: Pixels, strength: float, random: np.random.Generator) -> Pixels:
    """Multiply brightness, contrast and saturation, each by a random factor in 1 +- `strength` (Howard 2013)."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(random.uniform(1 - strength, 1 + strength))
    return np.asarray(image)
