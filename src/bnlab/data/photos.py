"""A list of photos that may have millions of rows: about 80 bytes a photo in arrays, where Python's strings take 500.

A `Photos` is a selection of rows from a table that all selections share, at four bytes a photo. `Photo` objects and
strings are made when they are asked for. Nothing changes once it is made, so threads may share it.
"""

import hashlib
from array import array
from binascii import unhexlify
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

# UTF-8 with this error handler encodes and decodes any string, also one with undecodable bytes as surrogates.
ERRORS = "surrogatepass"
_UNKNOWN = bytes(32)
# While the table is built, this many folders are remembered to store each once. The bound is for lists in which every
# photo has a folder of its own.
MAX_FOLDERS = 10_000
CHUNK = 4096  # rows that are converted to Python's objects at a time

Rows = NDArray[np.int32]
"""Row numbers of the table."""


@dataclass(frozen=True, slots=True)
class Photo:
    """One row of split.csv."""

    path: str
    label: str
    """name of its class"""
    split: str
    """train, val or test"""
    sha256: str
    """of the file, in hexadecimal; empty if it is not known"""


@dataclass(frozen=True, slots=True, eq=False)
class _Strings:
    """Strings as one array of bytes: string i lies between offsets i and i + 1."""

    content: bytearray = field(default_factory=bytearray)
    offsets: "array[int]" = field(default_factory=lambda: array("q", [0]))

    def append(self, text: bytes) -> int:
        self.content.extend(text)
        self.offsets.append(len(self.content))
        return len(self.offsets) - 2

    def __getitem__(self, i: int) -> str:
        return self.content[self.offsets[i] : self.offsets[i + 1]].decode("utf-8", ERRORS)


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """The columns of n photos."""

    folders: _Strings
    """each with its last slash"""
    folder: NDArray[np.int32]
    """positions in `folders`, n"""
    names: _Strings
    """file names, n"""
    class_splits: tuple[tuple[str, str], ...]
    """the pairs of class and split that occur"""
    class_split: NDArray[np.int32]
    """positions in `class_splits`, n"""
    digest: NDArray[np.uint8]
    """SHA-256 as bytes, n x 32; zeros if it is not known"""
    odd_sha256: dict[int, str]
    """by row: what a list gives as SHA-256 and is not one; `digest` then has the SHA-256 of that text"""

    def paths(self, rows: Rows) -> Iterator[str]:
        last, folder = -1, ""
        for chunk in _chunks(rows):
            for row, number in zip(chunk.tolist(), self.folder[chunk].tolist(), strict=True):
                if number != last:  # neighbours mostly have the same folder
                    last, folder = number, self.folders[number]
                yield folder + self.names[row]

    def photos(self, rows: Rows) -> Iterator[Photo]:
        for chunk in _chunks(rows):
            digests = self.digest[chunk].tobytes()
            columns = zip(chunk.tolist(), self.paths(chunk), self.class_split[chunk].tolist(), strict=True)
            for i, (row, path, number) in enumerate(columns):
                digest = digests[32 * i : 32 * i + 32]
                sha256 = self.odd_sha256.get(row, "" if digest == _UNKNOWN else digest.hex())
                label, split = self.class_splits[number]
                yield Photo(path, label, split, sha256)


class Photos(Sequence[Photo]):
    """Photos in a fixed order."""

    __slots__ = ("_rows", "_table")

    def __init__(self, table: _Table, rows: Rows) -> None:
        self._table, self._rows = table, rows

    @classmethod
    def of(cls, photos: Iterable[Photo]) -> "Photos":
        """These photos. An iterator is read one by one."""
        if isinstance(photos, Photos):
            return photos
        table = _read_table(photos)
        return cls(table, np.arange(len(table.folder), dtype=np.int32))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, i: int) -> Photo: ...
    @overload
    def __getitem__(self, i: slice) -> "Photos": ...
    def __getitem__(self, i: int | slice) -> "Photo | Photos":
        if isinstance(i, slice):
            return Photos(self._table, self._rows[i])
        return next(self._table.photos(self._rows[i, None]))

    def __iter__(self) -> Iterator[Photo]:
        return self._table.photos(self._rows)

    def __repr__(self) -> str:
        return f"<{len(self)} photos of {len(self.labels)} classes>"

    def take(self, indices: NDArray[np.integer[Any]]) -> "Photos":
        """The photos at these positions, in their order."""
        return Photos(self._table, self._rows[indices])

    def where(self, mask: NDArray[np.bool_]) -> "Photos":
        """The photos for which the mask is true."""
        return self.take(np.flatnonzero(mask))

    def in_split(self, split: str) -> "Photos":
        """The photos of train, val or test."""
        return self.where(self.is_in_split(split))

    def is_in_split(self, split: str) -> NDArray[np.bool_]:
        """For each photo whether it is in that split."""
        matches = np.array([name == split for _, name in self._table.class_splits], dtype=np.bool_)
        result: NDArray[np.bool_] = matches[self._table.class_split[self._rows]]
        return result

    @property
    def paths(self) -> Sequence[str]:
        return _Paths(self._table, self._rows)

    @property
    def labels(self) -> list[str]:
        """The classes that have photos here, sorted."""
        return sorted({label for label, _ in self.counts()})

    @property
    def splits(self) -> set[str]:
        """The splits that have photos here."""
        return {split for _, split in self.counts()}

    def counts(self) -> Counter[tuple[str, str]]:
        """Number of photos by (class, split), without those that have none."""
        numbers = np.bincount(self._table.class_split[self._rows]).tolist()
        return Counter({pair: n for pair, n in zip(self._table.class_splits, numbers, strict=False) if n})

    def class_indices(self, classes: Sequence[str]) -> NDArray[np.int64]:
        """For each photo the position of its class in `classes`.

        Raises:
            KeyError: the class of a photo is not in `classes`.
        """
        index = {label: i for i, label in enumerate(classes)}
        position = np.array([index.get(label, -1) for label, _ in self._table.class_splits], dtype=np.int64)
        indices: NDArray[np.int64] = position[self._table.class_split[self._rows]]
        if len(indices) and indices.min() < 0:
            raise KeyError(self[int(indices.argmin())].label)
        return indices

    @property
    def hashed(self) -> NDArray[np.bool_]:
        """For each photo whether its SHA-256 is known."""
        known: NDArray[np.bool_] = np.any(self._table.digest, axis=1)
        result: NDArray[np.bool_] = known[self._rows]
        return result

    def with_sha256(self, known: Iterable[tuple[int, str]]) -> "Photos":
        """The same photos, with a SHA-256 for those at the positions given. No row may be selected twice."""
        digest, odd_sha256 = self._table.digest.copy(), dict(self._table.odd_sha256)
        for i, sha256 in known:
            row = int(self._rows[i])
            digest[row] = np.frombuffer(_digest_of(row, sha256, odd_sha256), dtype=np.uint8)
        return Photos(replace(self._table, digest=digest, odd_sha256=odd_sha256), self._rows)

    def with_sha256_of(self, known: "Photos") -> "Photos":
        """The same photos, with the SHA-256 that `known` has for their paths (the last one, if it has several)."""
        keys = known._path_keys()
        order = np.argsort(keys, kind="stable")
        last = order[np.searchsorted(keys, self._path_keys(), side="right", sorter=order) - 1]
        pairs = enumerate(zip(self.paths, known.take(last), strict=True))
        return self.with_sha256((i, photo.sha256) for i, (path, photo) in pairs if photo.path == path)

    def count_shared(self, others: "Photos") -> int:
        """How many of these photos have a SHA-256 that one of the others has."""
        ours, theirs = self.where(self.hashed), others.where(others.hashed)
        our_keys, their_keys = ours._digest_keys(), theirs._digest_keys()
        # The first eight bytes leave few photos whose complete SHA-256 must be compared.
        known = {photo.sha256 for photo in theirs.where(_is_in(their_keys, our_keys))}
        return sum(photo.sha256 in known for photo in ours.where(_is_in(our_keys, their_keys)))

    def first_repeated_path(self) -> str | None:
        """The first path that occurs more than once, if any does."""
        keys = self._path_keys()
        ordered = np.sort(keys)
        repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        numbers = Counter(self.where(_is_in(keys, repeated)).paths)
        return next((path for path, number in numbers.items() if number > 1), None)

    def _path_keys(self) -> NDArray[np.int64]:
        """A hash of each path, valid within this process."""
        return np.fromiter(map(hash, self.paths), dtype=np.int64, count=len(self))

    def _digest_keys(self) -> NDArray[np.uint64]:
        keys: NDArray[np.uint64] = self._table.digest.view(np.uint64)[:, 0][self._rows]
        return keys


class _Paths(Sequence[str]):
    """The paths of photos, made when they are asked for."""

    __slots__ = ("_rows", "_table")

    def __init__(self, table: _Table, rows: Rows) -> None:
        self._table, self._rows = table, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return _Paths(self._table, self._rows[i])
        return next(self._table.paths(self._rows[i, None]))

    def __iter__(self) -> Iterator[str]:
        return self._table.paths(self._rows)


def _read_table(photos: Iterable[Photo]) -> _Table:
    """The table of these photos. Its arrays grow in place, so that they are never copied."""
    folders, names, folder_numbers = _Strings(), _Strings(), dict[bytes, int]()
    folder, class_split, digests = array("i"), array("i"), bytearray()
    class_splits, odd_sha256 = dict[tuple[str, str], int](), dict[int, str]()
    for row, photo in enumerate(photos):
        path = photo.path.encode("utf-8", ERRORS)
        end = path.rfind(b"/") + 1
        if (number := folder_numbers.get(path[:end])) is None:
            if len(folder_numbers) == MAX_FOLDERS:
                folder_numbers.clear()
            folder_numbers[path[:end]] = number = folders.append(path[:end])
        folder.append(number)
        names.append(path[end:])
        class_split.append(class_splits.setdefault((photo.label, photo.split), len(class_splits)))
        digests += _digest_of(row, photo.sha256, odd_sha256)
    return _Table(
        folders=folders,
        folder=np.frombuffer(folder, dtype=np.int32),
        names=names,
        class_splits=tuple(class_splits),
        class_split=np.frombuffer(class_split, dtype=np.int32),
        digest=np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32),
        odd_sha256=odd_sha256,
    )


def _digest_of(row: int, sha256: str, odd_sha256: dict[int, str]) -> bytes:
    """The 32 bytes to store for the SHA-256 of a row. One that is not in the usual form is noted in `odd_sha256`."""
    odd_sha256.pop(row, None)
    if not sha256:
        return _UNKNOWN
    with suppress(ValueError):
        digest = unhexlify(sha256)
        if len(digest) == 32 and digest.hex() == sha256 and digest != _UNKNOWN:
            return digest
    odd_sha256[row] = sha256
    return hashlib.sha256(sha256.encode("utf-8", ERRORS)).digest()


def _chunks(rows: Rows) -> Iterator[Rows]:
    return (rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK))


def _is_in(keys: NDArray[np.integer[Any]], others: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """`np.isin(keys, others)` with a third of its memory."""
    if not len(others):
        return np.zeros(len(keys), dtype=np.bool_)
    ordered = np.sort(others)
    at = np.searchsorted(ordered[:-1], keys)  # keys above the last but one are compared with the last
    result: NDArray[np.bool_] = ordered[at] == keys
    return result
