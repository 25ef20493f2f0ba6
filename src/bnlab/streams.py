"""Streams of random numbers. Each use of a seed has a stream that no other use repeats."""

from enum import IntEnum

import numpy as np


class Use(IntEnum):
    """What random numbers are drawn for. Another number for a use gives all trainings other results."""

    ORDER = 0  # of the photos, or of the batches, of an epoch
    AUGMENTATION = 1  # of a photo in an epoch
    SAMPLE = 2  # of the training photos
    MIXUP = 3  # of a step
    FIXED_BATCHES = 4  # which photos are in a batch together, if batches are shuffled
    EVALUATION_ORDER = 5  # of the photos that a study evaluates on
    GRADIENT_WEIGHTS = 6  # of the outputs whose gradient a study measures
    DEMO_ANSWERS = 7  # the photos that the demo shows
    BOOTSTRAP = 8  # the parts of a sample, drawn with replacement
    NOISE = 9  # of running statistics, which are averages of few batches


def random_stream(seed: int, use: Use, *numbers: int) -> np.random.Generator:
    """The stream for a use of the seed, such as for an epoch and a photo.

    numpy pads a short seed with zeros, so `default_rng((3, 0))`, `default_rng((3, 0, 0))` and `default_rng(3)` are one
    stream. So every seed here has its use in second place, and each use always has equally many numbers after it.
    """
    return np.random.default_rng((seed, use, *numbers))
