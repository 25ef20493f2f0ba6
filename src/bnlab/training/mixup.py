"""Mixup and CutMix: photos blended in pairs, and what their answers are then held against.

Shapes: N photos of 3 x H x W.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bnlab.recipe import Recipe


class Targets(NamedTuple):
    """The classes a batch is held against: of each photo, and of the one mixed into it, with the first one's share."""

    main: Tensor
    """N class indices"""
    other: Tensor | None = None
    """N class indices; None where nothing is mixed"""
    share: float = 1.0

    def loss(self, logits: Tensor, label_smoothing: float) -> Tensor:
        """Mean cross-entropy of the logits, N x classes, in nats."""
        loss = F.cross_entropy(logits, self.main, label_smoothing=label_smoothing)
        if self.other is None:
            return loss
        return self.share * loss + (1 - self.share) * F.cross_entropy(
            logits, self.other, label_smoothing=label_smoothing
        )


def mixed(images: Tensor, classes: Tensor, recipe: Recipe, step: int) -> tuple[Tensor, Targets]:
    """The batch as the recipe mixes it at a step: blended (mixup), pasted into (CutMix), or, with both, one of them.

    Each photo meets the one before it in the batch, the first the last: batches are shuffled anyway.
    """
    if not (recipe.mixup or recipe.cutmix):
        return images, Targets(classes)
    random = np.random.default_rng((recipe.seed, 3, step))
    paste = bool(recipe.cutmix) and (not recipe.mixup or random.random() < 0.5)
    alpha = recipe.cutmix if paste else recipe.mixup
    share = float(random.beta(alpha, alpha))
    other = images.roll(1, 0)  # N x 3 x H x W
    if paste:
        height, width = images.shape[2:]
        h, w = round(height * (1 - share) ** 0.5), round(width * (1 - share) ** 0.5)
        top, left = int(random.integers(0, height - h + 1)), int(random.integers(0, width - w + 1))
        images[:, :, top : top + h, left : left + w] = other[:, :, top : top + h, left : left + w]
        share = 1 - h * w / (height * width)
    else:
        images = torch.lerp(other, images, share)
    return images, Targets(classes, classes.roll(1, 0), share)
