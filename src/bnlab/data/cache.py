"""A cache of decoded photos, in memory or in a temporary file that is deleted with the process."""

import errno
import tempfile
import threading
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bnlab.data.preprocess import Pixels
from bnlab.files import storage_errors

_CHUNK = 64 * 2**20  # bytes of memory that are allocated at a time; a photo larger than this is not cached in memory


class Cache:
    """Keeps photos of any size (H x W x 3, uint8) by their index, up to a budget. It may be shared by threads."""

    def __init__(self, photos: int, budget: int, folder: Path | None = None) -> None:
        """A cache for the indices 0 to `photos` - 1 with `budget` bytes, in memory or in a file in `folder`."""
        self.budget = budget
        self.used = self._kept = 0
        self._storage = _Memory() if folder is None else _File(folder)
        self._photos = photos
        self._start = np.full(photos if budget else 0, -1, dtype=np.int64)  # offset of each photo; -1 if not cached
        self._shape = np.zeros((len(self._start), 2), dtype=np.int32)
        self._lock = threading.Lock()

    @property
    def is_full(self) -> bool:
        return self._kept == self._photos

    def get(self, i: int) -> Pixels | None:
        """Photo `i`, or None if it is not cached."""
        start = int(self._start[i]) if len(self._start) else -1
        if start < 0:
            return None
        height, width = self._shape[i].tolist()
        values = self._storage.read(start, height * width * 3)
        return None if values is None else values.reshape(height, width, 3)

    def put(self, i: int, photo: Pixels) -> None:
        """Cache photo `i`, if the budget allows. After a failed write nothing more is written."""
        with self._lock:
            if photo.nbytes > min(_CHUNK, self.budget - self.used) or self._start[i] >= 0:
                return
            try:
                start = self._storage.append(np.ascontiguousarray(photo).reshape(-1))
            except OSError:  # training goes on: photos can be decoded again
                self.budget = self.used
                return
            self.used += photo.nbytes
            self._kept += 1
            self._shape[i] = photo.shape[:2]
            self._start[i] = start  # last, because readers do not take the lock


def choose_cache(mode: str, photos: int, *, memory: int, disk: int, estimate: int, folder: Path) -> Cache:
    """The cache for a mode: "ram", "disk", "none", or "auto".

    "auto" uses memory, or the disk if memory is too small for all photos and the disk holds more. `memory` and `disk`
    are the budgets in bytes, and `estimate` is the expected size of a photo.
    """
    if mode == "auto":
        mode = "disk" if memory < min(photos * estimate, disk) else "ram"
    if mode == "disk":
        return Cache(photos, disk, folder)
    return Cache(photos, 0 if mode == "none" else memory)


class _Memory:
    """Photos in large chunks, so that they do not fragment the memory that training uses."""

    def __init__(self) -> None:
        self.chunks: list[NDArray[np.uint8]] = []
        self.end = 0

    def append(self, values: NDArray[np.uint8]) -> int:
        if self.end + values.nbytes > len(self.chunks) * _CHUNK:  # a photo lies within one chunk
            self.end = len(self.chunks) * _CHUNK
            self.chunks.append(np.empty(_CHUNK, dtype=np.uint8))  # the system allocates its pages when they are written
        start, offset = self.end, self.end % _CHUNK
        self.chunks[-1][offset : offset + values.nbytes] = values
        self.end += values.nbytes
        return start

    def read(self, start: int, count: int) -> NDArray[np.uint8] | None:
        chunk, offset = divmod(start, _CHUNK)
        return self.chunks[chunk][offset : offset + count]


class _File:
    """Photos in an unnamed file. It is not mapped, so that it does not count as this process's memory."""

    def __init__(self, folder: Path) -> None:
        with storage_errors(folder):
            self.file = tempfile.TemporaryFile(dir=folder, prefix=".cache", suffix=".part", buffering=0)  # noqa: SIM115
        weakref.finalize(self, self.file.close)
        self.end = 0
        self.lock = threading.Lock()  # of the file's position

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
                is_complete = self.file.readinto(values.data) == count
        except OSError:
            return None
        return values if is_complete else None
