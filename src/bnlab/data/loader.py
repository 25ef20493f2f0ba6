"""Batches of photos: `TrainingLoader` for training, `preprocessed_batches` for evaluation.

Each batch follows from the seed, the epoch and the photos alone; threads only prepare it earlier. They are threads and
not processes because Pillow releases Python's lock, and because photos would have to be copied between processes. They
read and scale photos and do not call torch: each thread that calls torch gets another thread pool, whose threads
spin on the cores that the network runs on and halve its speed.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import chain, islice
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from bnlab.data.cache import Cache
from bnlab.data.photo_file import MemoryPhoto, PhotoReader
from bnlab.data.photos import Photo, Photos
from bnlab.data.preprocess import Crops, Pixels, Preprocessing, images_per_photo, pre_resize, tta_crops
from bnlab.errors import PhotoError
from bnlab.machine import usable_cores
from bnlab.streams import Use, random_stream

_AHEAD = 4  # items that are prepared in advance

T = TypeVar("T")
R = TypeVar("R")


class TrainingLoader:
    """Augmented batches of the training photos.

    The crop and the flip of photo `i` in epoch `e` are drawn from (seed, e, i), so they do not depend on the batch
    size, the order, the cache or the number of workers.
    """

    def __init__(
        self,
        photos: Sequence[Photo],
        classes: Sequence[str],
        *,
        short_side: int,
        augment: Callable[[Pixels, int, np.random.Generator], Pixels],
        shuffle: Literal["photos", "batches"] = "photos",
        batch_size: int,
        seed: int,
        workers: int,
        cache: Cache | None = None,
        reader: PhotoReader | None = None,
    ) -> None:
        """Photos are scaled down to `short_side` pixels before they are cropped; 0 crops from the original.

        `augment` makes a square of a photo, from its pixels, the size and a generator of random numbers. `reader`
        (default: one with the default settings) opens the photos.
        """
        photos = Photos.of(photos)
        self.paths = photos.paths
        self.labels = photos.class_indices(classes)
        self.short_side, self.augment = short_side, augment
        self.shuffle, self.seed, self.workers = shuffle, seed, workers
        self.batches = number_of_batches(len(photos), batch_size)
        self.cache = cache or Cache(len(photos), 0)
        self.reader = reader or PhotoReader()

    def epoch(self, epoch: int, size: int, start: int = 0) -> Iterator[tuple[Pixels, NDArray[np.int64]]]:
        """The batches of an epoch from number `start` on: uint8 pixels N x size x size x 3, and class indices N.

        Raises:
            PhotoError: a photo can no longer be read.
        """
        batches = self._shuffled_batches(epoch)[start:]
        ahead = 2 * len(batches[0]) if self.short_side and batches else _AHEAD  # original photos may be large
        workers = 0 if self.cache.is_full else self.workers
        order = chain.from_iterable(batch.tolist() for batch in batches)
        with closing(prefetch_map(self.photo, order, workers, ahead)) as photos:
            for batch in batches:
                augmented = [
                    self.augment(photo, size, random_stream(self.seed, Use.AUGMENTATION, epoch, i))
                    for i, photo in zip(batch.tolist(), photos, strict=False)
                ]
                yield np.stack(augmented), self.labels[batch]

    def photo(self, i: int) -> Pixels:
        """Photo `i` before it is cropped, H x W x 3."""
        pixels = self.cache.get(i)
        if pixels is None:
            image = self.reader.open(self.paths[i], at_least=self.short_side)
            pixels = pre_resize(image, self.short_side) if self.short_side else np.array(image)
            self.cache.put(i, pixels)
        return pixels

    def sample(self, number: int) -> NDArray[np.int64]:
        """Indices of `number` photos (or of all, if there are fewer) in random order, the same at each call."""
        return random_stream(self.seed, Use.SAMPLE).permutation(len(self.paths))[:number]

    def _shuffled_batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """The indices of the photos in each batch of an epoch."""
        random = random_stream(self.seed, Use.ORDER, epoch)
        if self.shuffle == "photos":
            return np.array_split(random.permutation(len(self.paths)), self.batches)
        fixed = random_stream(self.seed, Use.FIXED_BATCHES).permutation(len(self.paths))
        batches = np.array_split(fixed, self.batches)
        return [batches[i] for i in random.permutation(self.batches)]


def number_of_batches(photos: int, batch_size: int) -> int:
    """Number of batches in an epoch. Their sizes differ by at most one, and no batch has a single photo.

    A small last batch would count as much as the others in the running statistics, and a batch of one photo has no
    variance.
    """
    return max(1, min(-(-photos // batch_size), photos // 2))


def preprocessed_batches(
    photos: Sequence[str | MemoryPhoto],
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int,
    cache: Cache | None = None,
    crops: Crops = 1,
    reader: PhotoReader | None = None,
) -> Iterator[tuple[Pixels, list[PhotoError | None]]]:
    """Preprocessed photos in the order given, with the errors of those that cannot be used.

    Each batch is (pixels, errors): uint8 pixels M*K x size x size x 3 of the M usable photos, the K crops of a photo
    (`images_per_photo`) one after the other, and for each photo of the batch its error or None. A batch has up to
    `batch_size` images, or those of one photo. Use a cache for the same photos, preprocessing and crops only. `reader`
    opens the photos, in the pixel range of the preprocessing.

    Raises:
        UsageError: the papers use no such number of crops.
    """
    size, kept = preprocessing.size, cache or Cache(len(photos), 0)
    reader = replace(reader or PhotoReader(), pixel_range=preprocessing.pixel_range)
    photos_per_batch = max(1, batch_size // images_per_photo(crops))

    def read(i: int) -> Pixels | PhotoError:
        pixels = kept.get(i)
        if pixels is None:
            try:
                image = reader.open(photos[i])
                pixels = tta_crops(image, preprocessing, crops).reshape(-1, size, 3)  # K*size x size x 3
            except PhotoError as error:
                return error
            kept.put(i, pixels)
        return pixels

    workers = 0 if kept.is_full else workers
    with closing(prefetch_map(read, range(len(photos)), workers, _AHEAD * photos_per_batch)) as results:
        while batch := list(islice(results, photos_per_batch)):
            usable = [photo for photo in batch if not isinstance(photo, PhotoError)]
            pixels = np.concatenate(usable) if usable else np.empty((0, size, 3), dtype=np.uint8)
            errors = [photo if isinstance(photo, PhotoError) else None for photo in batch]
            yield pixels.reshape(-1, size, size, 3), errors


def prefetch_map(
    make: Callable[[T], R], items: Iterable[T], workers: int, ahead: int = _AHEAD
) -> Generator[R, None, None]:
    """`map(make, items)` by `workers` threads; 0 uses the calling thread, -1 a thread for each core.

    `ahead` results, and one for each thread, are made before they are asked for.
    """
    workers = usable_cores() if workers < 0 else workers
    if workers == 0:
        yield from map(make, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="bnlab-loader")
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) > workers + ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
