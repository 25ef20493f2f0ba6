"""Mixup and CutMix: photos blended in pairs. The loss of such a batch is in loop.py."""

from typing import NamedTuple

import torch
from torch import Tensor

from bnlab.recipe import Recipe
from bnlab.streams import Use, random_stream


class Targets(NamedTuple):
    """The classes of the photos of a batch and, where pairs were mixed, of the photos mixed into them."""

    main: Tensor  # class indices, N
    other: Tensor | None = None  # class indices, N; None where nothing is mixed
    weight: float = 1.0  # fraction of `main` in the mix, in 0..1; that of `other` is the rest


def mix(images: Tensor, labels: Tensor, recipe: Recipe, step: int) -> tuple[Tensor, Targets]:
    """Blend the images of a step, N x 3 x H x W, (mixup) or paste into them (CutMix); with both, choose at random.

    Each photo is mixed with the one before it in the batch, the first with the last; batches are shuffled already.
    The weight follows Beta(a, a), a being `recipe.mixup` or `recipe.cutmix`. CutMix changes `images` in place.
    """
    if not (recipe.mixup or recipe.cutmix):
        return images, Targets(labels)
    random = random_stream(recipe.seed, Use.MIXUP, step)
    paste = bool(recipe.cutmix) and (not recipe.mixup or random.random() < 0.5)
    alpha = recipe.cutmix if paste else recipe.mixup
    weight = float(random.beta(alpha, alpha))
    other = images.roll(1, 0)  # N x 3 x H x W
    if paste:
        height, width = images.shape[2:]
        h, w = round(height * (1 - weight) ** 0.5), round(width * (1 - weight) ** 0.5)
        top, left = int(random.integers(0, height - h + 1)), int(random.integers(0, width - w + 1))
        images[:, :, top : top + h, left : left + w] = other[:, :, top : top + h, left : left + w]
        weight = 1 - h * w / (height * width)
    else:
        images = torch.lerp(other, images, weight)
    return images, Targets(labels, labels.roll(1, 0), weight)
