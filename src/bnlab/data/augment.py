"""What training does to a photo before the network sees it. Each draws from the generator it is given, and no other."""

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
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
    flip: float,
    color_jitter: float,
    random: np.random.Generator,
) -> Pixels:
    """A random part of the photo (H x W x 3) as a square of `size` x `size` x 3 pixels, mirrored with chance `flip`.

    The part has a share of the photo's area uniform in `area`, and an aspect (width to height) log-uniform in `aspect`.
    When ten tries do not fit in the photo, the largest centred part of a permitted aspect is taken, as in torchvision.
    """
    height, width = photo.shape[:2]
    pixels = resized(photo, size, random_box(width, height, area, aspect, random))
    if random.random() < flip:
        pixels = pixels[:, ::-1]
    return distorted(pixels, color_jitter, random) if color_jitter else np.ascontiguousarray(pixels)


def resized(photo: Pixels, size: int, box: Box) -> Pixels:
    """A part of the photo as a square, by bilinear interpolation that averages over all it shrinks.

    By torch, not by Pillow as in `preprocess`: it takes a third of the time, and a training crop need not be exact.
    To be called from the thread that trains (loader.py says why).
    """
    left, top, right, bottom = box
    if (right - left, bottom - top) == (size, size):
        return photo[top:bottom, left:right]
    part = torch.from_numpy(photo[top:bottom, left:right]).permute(2, 0, 1)[None]  # 1 x 3 x h x w
    square = F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0]  # 3 x size x size
    return square.permute(1, 2, 0).numpy()


def random_box(
    width: int, height: int, area: tuple[float, float], aspect: tuple[float, float], random: np.random.Generator
) -> Box:
    """Where `augment` crops."""
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


def distorted(pixels: Pixels, strength: float, random: np.random.Generator) -> Pixels:
    """Brightness, contrast and saturation, each times a factor from 1 - `strength` to 1 + `strength` (Howard 2013)."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(random.uniform(1 - strength, 1 + strength))
    return np.asarray(image)
