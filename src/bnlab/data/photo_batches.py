"""Batches of photos for a network in memory: read once, shuffled, and the same each time that they are gone through."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bnlab.data.cache import Cache
from bnlab.data.loader import preprocessed_batches
from bnlab.data.photo_file import PhotoReader
from bnlab.data.photos import Photos
from bnlab.data.preprocess import Preprocessing, normalise
from bnlab.data.scan import Refusal
from bnlab.streams import Use, random_stream

if TYPE_CHECKING:
    from torch import Tensor

_CACHE = 2 << 30  # bytes


@dataclass
class PhotoBatches:
    """Batches of (images, class indices), float32 N x 3 x size x size and int64 N, of a random sample of photos.

    A photo that cannot be used is left out and listed in `refused`, once the batches were gone through.
    """

    photos: Photos
    """all that may be drawn"""
    classes: Sequence[str]
    """in the order of the network's outputs"""
    preprocessing: Preprocessing
    batch_size: int
    images: int
    """how many photos are drawn, at most"""
    workers: int = -1
    seed: int = 0
    reader: PhotoReader = field(default_factory=PhotoReader)
    refused: list[Refusal] = field(default_factory=list)

    def __post_init__(self) -> None:
        drawn = random_stream(self.seed, Use.SAMPLE).permutation(len(self.photos))[: self.images]
        if len(drawn) > 1 and len(drawn) % self.batch_size == 1:
            drawn = drawn[:-1]  # a batch of one photo has no variance behind fully connected layers
        self.photos = self.photos[drawn]
        self.labels: NDArray[np.int64] = self.photos.class_indices(self.classes)
        size = 3 * self.preprocessing.size**2
        self.cache = Cache(len(self.photos), min(_CACHE, len(self.photos) * size))

    def __len__(self) -> int:
        return math.ceil(len(self.photos) / self.batch_size)

    def __iter__(self) -> Iterator[tuple["Tensor", "Tensor"]]:
        import torch

        refused, start = [], 0
        for pixels, errors in preprocessed_batches(
            self.photos.paths,
            self.preprocessing,
            batch_size=self.batch_size,
            workers=self.workers,
            cache=self.cache,
            reader=self.reader,
        ):
            labels = self.labels[start : start + len(errors)]
            for i, error in enumerate(errors):
                if error is not None:
                    refused.append(Refusal(error.path, error.reason, self.photos[start + i].label))
            start += len(errors)
            usable = np.array([error is None for error in errors])
            if usable.any():
                yield normalise(torch.from_numpy(pixels), self.preprocessing), torch.from_numpy(labels[usable])
        self.refused = refused
