"""A list of photos that may have millions of rows: 100 bytes a photo in arrays, where Python's objects take 600."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from bnlab.errors import plural

# UTF-8 with this error handler encodes and decodes any string, also one with undecodable bytes as surrogates.
ERRORS = "surrogatepass"
_UNKNOWN = bytes(32)
_NO_STAMP = (-1, -1)
CHUNK = 4096  # rows that are converted to Python's objects at a time

Rows = NDArray[np.int32]
"""Row numbers of the table."""
Stamp = tuple[int, int]
"""Size of a file in bytes, and the time of its last change in ns since 1970: a file that has both is not read again."""


class Content(NamedTuple):
    """The SHA-256 of a file, and the stamp that the file had before it was read."""

    sha256: str
    stamp: Stamp | None


@dataclass(frozen=True, slots=True)
class Photo:
    """A photo of a folder of classes, or a row of split.csv."""

    path: str
    label: str  # name of its class
    split: str = ""  # train, val or test; empty if it is not assigned
    sha256: str = ""  # of the file, in hexadecimal; empty if it is not known
    stamp: Stamp | None = field(default=None, compare=False)  # of the file when its SHA-256 was computed


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    folders: list[str]  # each once, with its last slash
    folder: NDArray[np.int32]  # positions in `folders`, n
    names: bytearray  # file names, one after the other
    name_edges: NDArray[np.int64]  # where each name begins and the one before it ends, n + 1
    class_splits: list[tuple[str, str]]  # the pairs of class and split that occur
    class_split: NDArray[np.int32]  # positions in `class_splits`, n
    digest: NDArray[np.void]  # SHA-256 as bytes, n of 32 bytes each; zeros if it is not known
    stamp: NDArray[np.int64]  # n x 2; -1 if it is not known

    def paths(self, rows: Rows) -> Iterator[str]:
        starts, ends = _values(self.name_edges[:-1], rows), _values(self.name_edges[1:], rows)
        for folder, start, end in zip(_values(self.folder, rows), starts, ends, strict=True):
            yield self.folders[folder] + self.names[start:end].decode("utf-8", ERRORS)

    def photos(self, rows: Rows) -> Iterator[Photo]:
        columns = self.paths(rows), *(_values(c, rows) for c in (self.class_split, self.digest, self.stamp))
        for path, number, digest, (size, changed) in zip(*columns, strict=True):
            label, split = self.class_splits[number]
            stamp = None if size < 0 else (size, changed)
            yield Photo(path, label, split, "" if digest == _UNKNOWN else digest.hex(), stamp)


class Photos(Sequence[Photo]):
    """Photos in a fixed order: some rows of a table that all selections share, at four bytes a photo.

    `Photo` objects and strings are made when they are asked for. Nothing changes once it is made, so threads may share
    it.
    """

    def __init__(self, table: _Table, rows: Rows) -> None:
        self._table, self._rows = table, rows

    @classmethod
    def of(cls, photos: Iterable[Photo]) -> "Photos":
        """These photos. An iterator is read one by one. A `sha256` that is not one counts as not known."""
        if isinstance(photos, Photos):
            return photos
        # These arrays grow in place and become the memory of the columns, so they are never copied.
        folder, name_edges, class_split, stamps = array("i"), array("q", [0]), array("i"), array("q")
        names, digests = bytearray(), bytearray()
        folders, class_splits = dict[str, int](), dict[tuple[str, str], int]()
        for photo in photos:
            parent, slash, name = photo.path.rpartition("/")
            folder.append(folders.setdefault(parent + slash, len(folders)))
            names += name.encode("utf-8", ERRORS)
            name_edges.append(len(names))
            class_split.append(class_splits.setdefault((photo.label, photo.split), len(class_splits)))
            digests += _digest(photo.sha256)
            stamps.extend(photo.stamp or _NO_STAMP)
        table = _Table(
            folders=list(folders),
            folder=np.frombuffer(folder, dtype=np.int32),
            names=names,
            name_edges=np.frombuffer(name_edges, dtype=np.int64),
            class_splits=list(class_splits),
            class_split=np.frombuffer(class_split, dtype=np.int32),
            digest=np.frombuffer(digests, dtype="V32"),
            stamp=np.frombuffer(stamps, dtype=np.int64).reshape(-1, 2),
        )
        return cls(table, np.arange(len(folder), dtype=np.int32))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, i: int) -> Photo: ...
    @overload
    def __getitem__(self, i: slice | NDArray[Any]) -> "Photos": ...
    def __getitem__(self, i: int | slice | NDArray[Any]) -> "Photo | Photos":
        """A photo; or photos, by a slice, an array of positions, or an array of booleans with one for each photo."""
        rows = self._rows[i]
        return Photos(self._table, rows) if isinstance(rows, np.ndarray) else next(self._table.photos(rows[None]))

    def __iter__(self) -> Iterator[Photo]:
        return self._table.photos(self._rows)

    def __repr__(self) -> str:
        return f"<{plural(len(self), 'photo')} of {plural(len(self.labels), 'class')}>"

    def in_split(self, *splits: str) -> "Photos":
        """The photos of one or more of train, val and test."""
        return self[self._by_class_split([split in splits for _, split in self._table.class_splits], np.bool_)]

    @property
    def paths(self) -> Sequence[str]:
        return _Paths(self._table, self._rows)

    @property
    def labels(self) -> list[str]:
        return sorted({label for label, _ in self.counts()})

    @property
    def splits(self) -> set[str]:
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
        unknown = set(self.labels) - set(classes)
        if unknown:
            raise KeyError(min(unknown))
        position = {label: i for i, label in enumerate(classes)}
        return self._by_class_split([position.get(label, -1) for label, _ in self._table.class_splits], np.int64)

    @property
    def hashed(self) -> NDArray[np.bool_]:
        """For each photo whether its SHA-256 is known."""
        known: NDArray[np.bool_] = self._table.digest != np.void(_UNKNOWN)
        return known[self._rows]

    @property
    def stamps(self) -> NDArray[np.int64]:
        """For each photo the size and the time of the last change that its file had, n x 2; -1 if not known."""
        return self._table.stamp[self._rows]

    @property
    def prefixes(self) -> NDArray[np.uint64]:
        """For each photo the first 8 bytes of its SHA-256, as a little-endian integer; 0 if it is not known."""
        return np.ascontiguousarray(self._table.digest[self._rows]).view("<u8")[::4]

    def with_content(self, known: Iterable[tuple[int, Content]]) -> "Photos":
        """The same photos, with the content of those at the positions given. No row may be selected twice."""
        digest, stamp = self._table.digest.copy(), self._table.stamp.copy()
        for i, content in known:
            digest[self._rows[i]] = _digest(content.sha256)
            stamp[self._rows[i]] = content.stamp or _NO_STAMP
        return Photos(replace(self._table, digest=digest, stamp=stamp), self._rows)

    def with_content_of(self, known: "Photos") -> "Photos":
        """The same photos, with the content that `known` has for their paths (the last one, if it has several)."""
        keys = known._path_keys()
        order = np.argsort(keys, kind="stable")
        last = order[np.searchsorted(keys, self._path_keys(), side="right", sorter=order) - 1]
        pairs = enumerate(zip(self.paths, known[last], strict=True))
        return self.with_content((i, Content(p.sha256, p.stamp)) for i, (path, p) in pairs if p.path == path)

    def same_content(self, others: "Photos") -> NDArray[np.bool_]:
        """For each photo whether the other photo at its position has the same SHA-256."""
        same: NDArray[np.bool_] = self._table.digest[self._rows] == others._table.digest[others._rows]
        return same

    @property
    def folders(self) -> list[str]:
        """The folders of all photos that this list was selected from, each once, with its last slash."""
        return self._table.folders

    def moved(self, before: str, after: str) -> "Photos":
        """The same photos, with the folder `after` in place of the folder `before` in their paths."""
        old, new = before.rstrip("/") + "/", after.rstrip("/") + "/"
        folders = [new + path[len(old) :] if path.startswith(old) else path for path in self._table.folders]
        return Photos(replace(self._table, folders=folders), self._rows)

    def count_shared(self, others: "Photos") -> int:
        """How many of these photos have a SHA-256 that one of the others has."""
        ours = Counter[bytes](_values(self._table.digest, self._rows))
        del ours[_UNKNOWN]
        return sum(ours[digest] for digest in ours.keys() & _values(others._table.digest, others._rows))

    def first_repeated_path(self) -> str | None:
        """The first path that occurs more than once, if any does."""
        keys = self._path_keys()
        ordered = np.sort(keys)
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        numbers = Counter(self[np.isin(keys, repeated)].paths)
        return next((path for path, number in numbers.items() if number > 1), None)

    def _path_keys(self) -> NDArray[np.int64]:
        """A hash of each path, valid within this process."""
        return np.fromiter(map(hash, self.paths), dtype=np.int64, count=len(self))

    def _by_class_split(self, values: Sequence[Any], dtype: type[np.generic]) -> NDArray[Any]:
        """For each photo the value of its class and split, given in the order of the table's `class_splits`."""
        return np.array(values, dtype=dtype)[self._table.class_split[self._rows]]


class _Paths(Sequence[str]):
    """The paths of photos, made when they are asked for."""

    def __init__(self, table: _Table, rows: Rows) -> None:
        self._table, self._rows = table, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: Any) -> Any:
        rows = self._rows[i]
        return _Paths(self._table, rows) if isinstance(rows, np.ndarray) else next(self._table.paths(rows[None]))

    def __iter__(self) -> Iterator[str]:
        return self._table.paths(self._rows)


def _values(column: NDArray[Any], rows: Rows) -> Iterator[Any]:
    """The values of a column in these rows, as Python's objects."""
    for i in range(0, len(rows), CHUNK):
        yield from column[rows[i : i + CHUNK]].tolist()


def _digest(sha256: str) -> bytes:
    with suppress(ValueError):
        if len(digest := bytes.fromhex(sha256)) == 32:
            return digest
    return _UNKNOWN
