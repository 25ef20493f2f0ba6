"""Photos by the million: in arrays, and as Python's own objects only while they are looked at.

A `Photos` is a choice of rows of a table that all choices from it share: a choice costs four bytes a photo.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from bnlab.data.photo_table import UNKNOWN, Numbers, Table, read_table


@dataclass(frozen=True, slots=True)
class Photo:
    """One row of split.csv."""

    path: str
    """where the file lies"""
    label: str
    """its class"""
    split: str
    """train, val or test"""
    sha256: str
    """of the file; empty where it is not known"""


class Photos(Sequence[Photo]):
    """Photos in an order, immutable."""

    __slots__ = ("_rows", "_table")

    def __init__(self, table: Table, rows: Numbers) -> None:
        self._table, self._rows = table, rows

    @classmethod
    def of(cls, photos: Iterable[Photo]) -> "Photos":
        """These photos; an iterator is read one by one. At most 256 different splits."""
        if isinstance(photos, Photos):
            return photos
        table = read_table((photo.path, photo.label, photo.split, photo.sha256) for photo in photos)
        return cls(table, np.arange(len(table.label), dtype=np.int32))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, i: int) -> Photo: ...
    @overload
    def __getitem__(self, i: slice) -> "Photos": ...
    def __getitem__(self, i: int | slice) -> "Photo | Photos":
        if isinstance(i, slice):
            return Photos(self._table, self._rows[i])
        return Photo(*next(self._table.rows(self._rows[i, None])))

    def __iter__(self) -> Iterator[Photo]:
        return starmap(Photo, self._table.rows(self._rows))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Photos):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self)} photos of {len(self.labels)} classes>"

    def take(self, indices: NDArray[np.integer[Any]]) -> "Photos":
        """The photos at these positions, in their order; nothing but the positions is copied."""
        return Photos(self._table, self._rows[indices])

    def in_split(self, split: str) -> "Photos":
        """The photos of train, val or test."""
        return self.take(np.flatnonzero(self.is_in_split(split)))

    def is_in_split(self, split: str) -> NDArray[np.bool_]:
        """Of each photo whether it is on that side."""
        table = self._table
        if split not in table.splits:
            return np.zeros(len(self), dtype=np.bool_)
        there: NDArray[np.bool_] = table.split[self._rows] == table.splits.index(split)
        return there

    @property
    def paths(self) -> Sequence[str]:
        """Where the photos lie."""
        return _Paths(self._table, self._rows)

    @property
    def labels(self) -> list[str]:
        """The classes there are photos of, sorted."""
        return sorted({label for label, _ in self.counts()})

    @property
    def splits(self) -> set[str]:
        """The sides there are photos on."""
        return {split for _, split in self.counts()}

    def counts(self) -> Counter[tuple[str, str]]:
        """Class and side to number of photos, without those that have none."""
        table, width = self._table, max(1, len(self._table.splits))
        numbers = np.bincount(table.label[self._rows] * np.int64(width) + table.split[self._rows])
        return Counter(
            {
                (table.labels[cell // width], table.splits[cell % width]): int(numbers[cell])
                for cell in np.flatnonzero(numbers).tolist()
            }
        )

    def class_indices(self, classes: Sequence[str]) -> NDArray[np.int64]:
        """Of each photo the position of its class among `classes`.

        Raises:
            KeyError: there is a photo of a class that is not among them.
        """
        index = {label: i for i, label in enumerate(classes)}
        position = np.array([index.get(label, -1) for label in self._table.labels], dtype=np.int64)
        indices: NDArray[np.int64] = position[self._table.label[self._rows]]
        if len(indices) and indices.min() < 0:
            raise KeyError(self[int(indices.argmin())].label)
        return indices

    @property
    def hashed(self) -> NDArray[np.bool_]:
        """Of each photo whether its SHA-256 is known."""
        known: NDArray[np.bool_] = self._table.kind[self._rows] != UNKNOWN
        return known

    def with_sha256(self, known: Iterable[tuple[int, str]]) -> "Photos":
        """The same photos, those at the positions given with that SHA-256. None may have been taken twice."""
        rows = ((int(self._rows[i]), sha256) for i, sha256 in known)
        return Photos(self._table.with_sha256(rows), self._rows)

    def with_sha256_of(self, known: "Photos") -> "Photos":
        """The same photos, with the SHA-256 that others of the same paths have; of two of one path, the last's."""
        keys = known._path_keys()
        order = np.argsort(keys, kind="stable")
        last = order[np.searchsorted(keys, self._path_keys(), side="right", sorter=order) - 1]
        pairs = enumerate(zip(self.paths, known.take(last), strict=True))
        return self.with_sha256((i, photo.sha256) for i, (path, photo) in pairs if photo.path == path)

    def count_shared(self, others: "Photos") -> int:
        """How many have a SHA-256 that one of the others has."""
        ours, theirs = self.take(np.flatnonzero(self.hashed)), others.take(np.flatnonzero(others.hashed))
        our_keys, their_keys = ours._digest_keys(), theirs._digest_keys()
        # The first eight bytes leave few to compare by the rest.
        suspects = theirs.take(np.flatnonzero(_among(their_keys, our_keys)))
        known = {photo.sha256 for photo in suspects}
        return sum(photo.sha256 in known for photo in ours.take(np.flatnonzero(_among(our_keys, their_keys))))

    def first_repeated_path(self) -> str | None:
        """The first path that is there more than once."""
        keys = self._path_keys()
        ordered = np.sort(keys)
        again = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        if not len(again):
            return None
        suspects = Counter(self.take(np.flatnonzero(_among(keys, again))).paths)
        return next((path for path, number in suspects.items() if number > 1), None)

    def _path_keys(self) -> NDArray[np.int64]:
        """A hash of each path, of use within this process."""
        return np.fromiter(map(hash, self.paths), dtype=np.int64, count=len(self))

    def _digest_keys(self) -> NDArray[np.uint64]:
        keys: NDArray[np.uint64] = self._table.digest.view(np.uint64)[:, 0][self._rows]
        return keys


def _among(keys: NDArray[np.integer[Any]], others: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """`np.isin` in a third of the memory."""
    if not len(others):
        return np.zeros(len(keys), dtype=np.bool_)
    ordered = np.sort(others)
    at = np.searchsorted(ordered[:-1], keys)  # beyond the last but one is the last
    there: NDArray[np.bool_] = ordered[at] == keys
    return there


class _Paths(Sequence[str]):
    """The paths of rows, made as they are asked for."""

    __slots__ = ("_rows", "_table")

    def __init__(self, table: Table, rows: Numbers) -> None:
        self._table, self._rows = table, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[str]: ...
    def __getitem__(self, i: int | slice) -> str | Sequence[str]:
        if isinstance(i, slice):
            return _Paths(self._table, self._rows[i])
        return next(self._table.paths(self._rows[i, None]))

    def __iter__(self) -> Iterator[str]:
        return self._table.paths(self._rows)
