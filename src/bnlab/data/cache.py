"""Photos kept once they are decoded, in memory or in a file that vanishes with the process."""

import errno
import tempfile
import threading
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bnlab.data.preprocess import Pixels
from bnlab.files import storage_errors

_CHUNK = 64 * 2**20  # bytes of memory taken at once; a photo larger than that is not kept there


class Cache:
    """Up to `photos` photos of any size, each H x W x 3, by their number. Safe to use from several threads.

    What does not fit into the budget is not kept, and `get` gives None for it, as for what was never put.
    """

    def __init__(self, photos: int, budget: int, folder: Path | None = None) -> None:
        """`budget` in bytes; in memory, or in an unnamed file in `folder`."""
        self.budget = budget
        self.used = self._kept = 0
        self._place = _Memory() if folder is None else _File(folder)
        self._photos = photos
        self._start = np.full(photos if budget else 0, -1, dtype=np.int64)  # where a photo begins
        self._shape = np.zeros((len(self._start), 2), dtype=np.int32)
        self._lock = threading.Lock()

    @property
    def is_full(self) -> bool:
        """Whether every photo is kept."""
        return self._kept == self._photos

    def get(self, i: int) -> Pixels | None:
        """Photo `i`, or None."""
        start = int(self._start[i]) if len(self._start) else -1
        if start < 0:
            return None
        height, width = (int(side) for side in self._shape[i])
        values = self._place.read(start, height * width * 3)
        return None if values is None else values.reshape(height, width, 3)

    def put(self, i: int, photo: Pixels) -> None:
        """Keep photo `i`, if there is room. A disk that fails is no longer written to: photos can be decoded again."""
        with self._lock:
            if photo.nbytes > min(_CHUNK, self.budget - self.used) or self._start[i] >= 0:
                return
            try:
                start = self._place.append(np.ascontiguousarray(photo).reshape(-1))
            except OSError:
                self.budget = self.used
                return
            self.used += photo.nbytes
            self._kept += 1
            self._shape[i] = photo.shape[:2]
            self._start[i] = start  # last: a reader without the lock sees all of it or nothing


class _Memory:
    def __init__(self) -> None:
        self.chunks: list[NDArray[np.uint8]] = []
        self.end = 0

    def append(self, values: NDArray[np.uint8]) -> int:
        if self.end + values.nbytes > len(self.chunks) * _CHUNK:  # a photo lies within one chunk
            self.end = len(self.chunks) * _CHUNK
            self.chunks.append(np.empty(_CHUNK, dtype=np.uint8))  # the system gives it as it is written to
        start, offset = self.end, self.end % _CHUNK
        self.chunks[-1][offset : offset + values.nbytes] = values
        self.end += values.nbytes
        return start

    def read(self, start: int, count: int) -> NDArray[np.uint8] | None:
        chunk, offset = divmod(start, _CHUNK)
        return self.chunks[chunk][offset : offset + count]


class _File:
    """Read and written by position, not mapped: what the system keeps of it in memory is not this process's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with storage_errors(folder):
            self.file = tempfile.TemporaryFile(dir=folder, prefix=".cache", suffix=".part", buffering=0)  # noqa: SIM115
        weakref.finalize(self, self.file.close)
        self.end = 0
        self.lock = threading.Lock()  # of the file's one position

    def append(self, values: NDArray[np.uint8]) -> int:
        with self.lock:
            self.file.seek(self.end)
            if self.file.write(values.data) < values.nbytes:
                raise OSError(errno.ENOSPC, "the disk is full")
        self.end += values.nbytes
        return self.end - values.nbytes

    def read(self, start: int, count: int) -> NDArray[np.uint8] | None:
        values = np.empty(count, dtype=np.uint8)
        try:
            with self.lock:
                self.file.seek(start)
                whole = self.file.readinto(values.data) == count
        except OSError:
            return None
        return values if whole else None


def choose_cache(mode: str, photos: int, *, memory: int, disk: int, estimate: int, folder: Path) -> Cache:
    """The cache for so many photos of about `estimate` bytes each: `mode` is auto, ram, disk or none.

    `memory` and `disk` are the most it may take of each, in bytes. "auto" is the memory, or the disk where not all
    photos fit into the one and more do into the other.
    """
    if mode == "auto":
        mode = "disk" if memory < min(photos * estimate, disk) else "ram"
    match mode:
        case "none":
            return Cache(photos, 0)
        case "ram":
            return Cache(photos, memory)
        case _:
            return Cache(photos, disk, folder)
