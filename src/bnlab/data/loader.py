"""Batches of photos. Each batch is a pure function of the seed, the epoch and the photos; threads only make it sooner.

Threads, not processes: decoding and resizing release Python's lock, and there is nothing to start, to copy or to share.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from bnlab.data.listing import Photo
from bnlab.data.pixels import Pixels, View, augment, open_photo, prepare
from bnlab.errors import PhotoError
from bnlab.machine import usable_cores

# What a number drawn from the seed is for; each use has a stream of its own.
_ORDER, _AUGMENTATION = 0, 1
_AHEAD = 4  # batches made in advance

T = TypeVar("T")
R = TypeVar("R")


class TrainingLoader:
    """Augmented batches of train.

    Photo `i` in epoch `e` looks the same whatever the batch, the order or the number of workers, for its crop and flip
    are drawn from (seed, e, i).
    """

    def __init__(
        self,
        photos: Sequence[Photo],
        classes: Sequence[str],
        *,
        size: int,
        area: tuple[float, float],
        aspect: tuple[float, float],
        flip: float,
        batch_size: int,
        seed: int,
        workers: int,
    ) -> None:
        index = {label: i for i, label in enumerate(classes)}
        self.paths = [photo.path for photo in photos]
        self.labels = np.array([index[photo.label] for photo in photos], dtype=np.int64)
        self.size, self.area, self.aspect, self.flip = size, area, aspect, flip
        self.seed = seed
        self.workers = workers
        self.batches = number_of_batches(len(photos), batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Pixels, NDArray[np.int64]]]:
        """The batches of an epoch from the one numbered `start`: uint8 pixels N x H x W x 3 and class indices N.

        Raises:
            PhotoError: a photo can no longer be read.
        """
        order = np.random.default_rng((self.seed, _ORDER, epoch)).permutation(len(self.paths))
        batches = np.array_split(order, self.batches)[start:]

        def make(batch: NDArray[np.int64]) -> tuple[Pixels, NDArray[np.int64]]:
            return np.stack([self._augmented(epoch, int(i)) for i in batch]), self.labels[batch]

        return in_order(make, batches, self.workers)

    def _augmented(self, epoch: int, i: int) -> Pixels:
        return augment(
            open_photo(self.paths[i]),
            self.size,
            area=self.area,
            aspect=self.aspect,
            flip=self.flip,
            random=np.random.default_rng((self.seed, _AUGMENTATION, epoch, i)),
        )


def number_of_batches(photos: int, batch_size: int) -> int:
    """Batches to an epoch. Their sizes differ by at most one and none has a single photo.

    A last batch of a few photos would count as much as any other in the running statistics, and one of a single photo
    has no variance at all.
    """
    return max(1, min(-(-photos // batch_size), photos // 2))


def prepared_batches(
    paths: Sequence[str], view: View, *, batch_size: int, workers: int
) -> Iterator[tuple[Pixels, list[PhotoError | None]]]:
    """Photos as evaluation sees them, in the order given: pixels of those that can be used, M x H x W x 3, and for each
    photo of the batch its error or None."""

    def look(path: str) -> Pixels | PhotoError:
        try:
            return prepare(open_photo(path), view)
        except PhotoError as error:
            return error

    def make(batch: Sequence[str]) -> tuple[Pixels, list[PhotoError | None]]:
        looks = [look(path) for path in batch]
        good = [one for one in looks if not isinstance(one, PhotoError)]
        pixels = np.stack(good) if good else np.empty((0, view.size, view.size, 3), dtype=np.uint8)
        return pixels, [one if isinstance(one, PhotoError) else None for one in looks]

    batches = [paths[i : i + batch_size] for i in range(0, len(paths), batch_size)]
    return in_order(make, batches, workers)


def in_order(make: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`map(make, items)`, with `workers` threads some items ahead (0: none, -1: as many as there are cores)."""
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
            if len(made) > workers + _AHEAD:
                yield made.popleft().result()
        while made:
            yield made.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
