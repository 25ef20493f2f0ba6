"""Photos kept once they are decoded, in memory or in a file that vanishes with the process."""

import mmap
import tempfile
import threading
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from bnlab.data.pixels import Pixels
from bnlab.files import storage_errors

_CHUNK = 64 * 2**20  # bytes; a photo larger than that is not kept


class Cache:
    """Up to `photos` photos of any size, each H x W x 3, by their number. Safe to use from several threads.

    What does not fit into the budget is not kept, and `get` gives None for it, as for what was never put.
    """

    def __init__(self, photos: int, budget: int, folder: Path | None = None) -> None:
        """`budget` in bytes; in memory, or in an unnamed file in `folder`."""
        self.budget, self.folder = budget, folder
        self.used = 0
        self._start = np.full(photos, -1, dtype=np.int64)  # where a photo begins, over all chunks
        self._shape = np.zeros((photos, 2), dtype=np.int32)
        self._chunks: list[NDArray[np.uint8]] = []
        self._end = 0
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None

    def get(self, i: int) -> Pixels | None:
        """Photo `i`, or None."""
        start = int(self._start[i])
        if start < 0:
            return None
        height, width = self._shape[i]
        chunk, offset = divmod(start, _CHUNK)
        return self._chunks[chunk][offset : offset + int(height) * int(width) * 3].reshape(height, width, 3)

    def put(self, i: int, photo: Pixels) -> None:
        """Keep photo `i`, if there is room.

        Raises:
            StorageError: the disk is full.
        """
        with self._lock:
            if self._start[i] >= 0 or photo.nbytes > _CHUNK or self.used + photo.nbytes > self.budget:
                return
            if self._end + photo.nbytes > len(self._chunks) * _CHUNK:
                self._end = len(self._chunks) * _CHUNK
                self._chunks.append(self._new_chunk())
            start, offset = self._end, self._end % _CHUNK
            self._chunks[-1][offset : offset + photo.nbytes] = photo.reshape(-1)
            self._end += photo.nbytes
            self.used += photo.nbytes
            self._shape[i] = photo.shape[:2]
            self._start[i] = start  # last: a reader without the lock sees all of it or nothing

    def _new_chunk(self) -> NDArray[np.uint8]:
        if self.folder is None:
            return np.empty(_CHUNK, dtype=np.uint8)  # memory is taken as it is written to
        with storage_errors(self.folder):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self.folder, prefix=".cache")
            at = len(self._chunks) * _CHUNK
            self._file.seek(at)
            for _ in range(0, _CHUNK, 2**20):  # written, not only sized: a full disk then says so here, and kills none
                self._file.write(bytes(2**20))
            self._file.flush()
            return np.frombuffer(mmap.mmap(self._file.fileno(), _CHUNK, offset=at), dtype=np.uint8)


def choose_cache(mode: str, photos: int, *, memory: int, disk: int, estimate: int, folder: Path) -> Cache:
    """The cache for so many photos of about `estimate` bytes each: `mode` is auto, ram, disk or none.

    `memory` and `disk` are the most it may take of each, in bytes. "auto" is the memory, or the disk where not all
    photos fit into the one and more do into the other.
    """
    needed = photos * estimate
    if mode == "auto":
        mode = "disk" if memory < needed and memory < disk else "ram"
    if mode == "none":
        return Cache(photos, 0)
    return Cache(photos, memory) if mode == "ram" else Cache(photos, disk, folder)
