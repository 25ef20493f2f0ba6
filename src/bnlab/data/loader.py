"""Batches of photos. Each batch is a pure function of the seed, the epoch and the photos; threads only make it sooner.

Threads, not processes: Pillow lets go of Python's lock, and there is nothing to start, to copy or to share. They read
and shrink photos, and leave torch alone: each thread that calls it gets a team of threads of its own, which wait for
work by spinning on the cores that the network runs on, and halve its speed.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import chain
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from bnlab.data.augment import augment
from bnlab.data.cache import Cache
from bnlab.data.crops import Crops, images_per_photo
from bnlab.data.crops import crops as crops_of
from bnlab.data.photos import Photo, Photos
from bnlab.data.preprocess import Pixels, Preprocessing, open_photo, shrunk
from bnlab.errors import PhotoError
from bnlab.machine import usable_cores

# What a number drawn from the seed is for; each use has a stream of its own.
_ORDER, _AUGMENTATION, _SAMPLE = 0, 1, 2
_AHEAD = 4  # items made in advance

T = TypeVar("T")
R = TypeVar("R")


class TrainingLoader:
    """Augmented batches of train.

    Photo `i` in epoch `e` looks the same whatever the batch, the order, the cache or the number of workers, for its
    crop and flip are drawn from (seed, e, i).
    """

    def __init__(
        self,
        photos: Sequence[Photo],
        classes: Sequence[str],
        *,
        side: int,
        area: tuple[float, float],
        aspect: tuple[float, float],
        flip: float,
        color_jitter: float = 0.0,
        shuffle: Literal["photos", "batches"] = "photos",
        batch_size: int,
        seed: int,
        workers: int,
        cache: Cache | None = None,
    ) -> None:
        """Crops are from photos shrunk to a short side of `side`, or, where it is 0, as they are."""
        photos = Photos.of(photos)
        self.paths = photos.paths
        self.labels = photos.class_indices(classes)
        self.side, self.area, self.aspect, self.flip, self.color_jitter = side, area, aspect, flip, color_jitter
        self.shuffle, self.seed, self.workers = shuffle, seed, workers
        self.batches = number_of_batches(len(photos), batch_size)
        self.cache = cache or Cache(len(photos), 0)

    def epoch(self, epoch: int, size: int, start: int = 0) -> Iterator[tuple[Pixels, NDArray[np.int64]]]:
        """The batches of an epoch from the one numbered `start`: uint8 pixels N x size x size x 3, class indices N.

        Raises:
            PhotoError: a photo can no longer be read.
        """

        order = self._order(epoch)[start:]
        ahead = 2 * len(order[0]) if self.side and order else _AHEAD  # photos as they are may be large
        workers = 0 if self.cache.is_full else self.workers
        with closing(
            prefetch_map(self.photo, chain.from_iterable(b.tolist() for b in order), workers, ahead)
        ) as photos:
            for batch in order:
                numbered = zip(batch.tolist(), photos, strict=False)
                yield np.stack([self._augmented(epoch, size, i, photo) for i, photo in numbered]), self.labels[batch]

    def sample(self, photos: int) -> NDArray[np.int64]:
        """So many photos' numbers, or all there are, the same ones each time, in random order."""
        return np.random.default_rng((self.seed, _SAMPLE)).permutation(len(self.paths))[:photos]

    def _order(self, epoch: int) -> list[NDArray[np.int64]]:
        random = np.random.default_rng((self.seed, _ORDER, epoch))
        if self.shuffle == "photos":
            return np.array_split(random.permutation(len(self.paths)), self.batches)
        always = np.random.default_rng((self.seed, _ORDER)).permutation(len(self.paths))
        batches = np.array_split(always, self.batches)
        return [batches[i] for i in random.permutation(self.batches)]

    def _augmented(self, epoch: int, size: int, i: int, photo: Pixels) -> Pixels:
        return augment(
            photo,
            size,
            area=self.area,
            aspect=self.aspect,
            flip=self.flip,
            color_jitter=self.color_jitter,
            random=np.random.default_rng((self.seed, _AUGMENTATION, epoch, i)),
        )

    def photo(self, i: int) -> Pixels:
        """Photo `i` as crops are taken from it, H x W x 3."""
        kept = self.cache.get(i)
        if kept is not None:
            return kept
        image = open_photo(self.paths[i], at_least=self.side)
        photo = shrunk(image, self.side) if self.side else np.array(image)
        self.cache.put(i, photo)
        return photo


def number_of_batches(photos: int, batch_size: int) -> int:
    """Batches to an epoch. Their sizes differ by at most one and none has a single photo.

    A last batch of a few photos would count as much as any other in the running statistics, and one of a single photo
    has no variance at all.
    """
    return max(1, min(-(-photos // batch_size), photos // 2))


def preprocessed_batches(
    paths: Sequence[str],
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int,
    cache: Cache | None = None,
    crops: Crops = 1,
) -> Iterator[tuple[Pixels, list[PhotoError | None]]]:
    """Photos as evaluation sees them, in the order given: pixels of those that can be used, M x H x W x 3, and for each
    photo of the batch its error or None. `cache` is of these paths, this view and these crops alone.

    Of M photos with K pictures each (`images_per_photo`) it is M*K x H x W x 3, a photo's pictures one after the other.
    A batch has up to `batch_size` pictures, or one photo's.
    """
    kept = cache or Cache(len(paths), 0)
    photos_each = max(1, batch_size // images_per_photo(crops))

    def look(i: int) -> Pixels | PhotoError:
        try:
            pixels = kept.get(i)
            if pixels is None:
                pixels = crops_of(open_photo(paths[i]), preprocessing, crops).reshape(
                    -1, preprocessing.size, 3
                )  # K*H x W x 3
                kept.put(i, pixels)
            return pixels
        except PhotoError as error:
            return error

    def make(batch: range) -> tuple[Pixels, list[PhotoError | None]]:
        looks = [look(i) for i in batch]
        good = [one for one in looks if not isinstance(one, PhotoError)]
        pixels = np.concatenate(good) if good else np.empty((0, preprocessing.size, 3), dtype=np.uint8)
        errors = [one if isinstance(one, PhotoError) else None for one in looks]
        return pixels.reshape(-1, preprocessing.size, preprocessing.size, 3), errors  # M*K x H x W x 3

    everything = range(len(paths))
    batches = [everything[i : i + photos_each] for i in range(0, len(paths), photos_each)]
    return prefetch_map(make, batches, workers)


def prefetch_map(
    make: Callable[[T], R], items: Iterable[T], workers: int, ahead: int = _AHEAD
) -> Generator[R, None, None]:
    """`map(make, items)`, by `workers` threads: 0 is none, -1 as many as there are cores.

    `ahead` items, and one for each thread, are made before they are asked for.
    """
    workers = usable_cores() if workers < 0 else workers
    if workers == 0:
        yield from map(make, items)
        return
    waiting = iter(items)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="bnlab-loader")
    made: deque[Future[R]] = deque()
    try:
        for item in waiting:
            made.append(pool.submit(make, item))
            if len(made) > workers + ahead:
                yield made.popleft().result()
        while made:
            yield made.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
