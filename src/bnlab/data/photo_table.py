"""Many rows of path, class, side and SHA-256 as arrays: some 80 bytes a row where strings in objects take 500.

Strings are made as they are asked for. Nothing is written to once it is made, so that whoever reads may share it.
"""

import hashlib
from array import array
from binascii import unhexlify
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

# With it UTF-8 takes every string to bytes and back, also one with undecodable bytes as surrogates.
ERRORS = "surrogatepass"
# A folder is stored once as long as no more others than so many come between; the bound is for lists whose every photo
# has a folder of its own.
MAX_FOLDERS = 10_000
CHUNK = 4096  # rows that are Python's numbers at one time
UNKNOWN, DIGEST, TEXT = range(3)  # what is known of a SHA-256: nothing, its 32 bytes, a text that is none

Row = tuple[str, str, str, str]
"""path, class, side, SHA-256"""
Numbers = NDArray[np.int32]
"""of rows"""


@dataclass(frozen=True, slots=True, eq=False)
class _Texts:
    """Texts as one run of bytes: text i is what stands between offsets i and i + 1."""

    blob: bytearray = field(default_factory=bytearray)
    offsets: "array[int]" = field(default_factory=lambda: array("q", [0]))

    def append(self, text: bytes) -> int:
        """Add a text, and say its number."""
        self.blob.extend(text)
        self.offsets.append(len(self.blob))
        return len(self.offsets) - 2

    def __getitem__(self, i: int) -> str:
        return self.blob[self.offsets[i] : self.offsets[i + 1]].decode("utf-8", ERRORS)


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """What is known of n photos, by column."""

    folders: _Texts
    """each with its last slash"""
    names: _Texts
    """of the files"""
    folder: NDArray[np.int32]
    """n numbers of folders"""
    labels: tuple[str, ...]
    label: NDArray[np.int32]
    """n positions in `labels`"""
    splits: tuple[str, ...]
    split: NDArray[np.uint8]
    """n positions in `splits`"""
    digest: NDArray[np.uint8]
    """n x 32"""
    kind: NDArray[np.uint8]
    """n times UNKNOWN, DIGEST or TEXT"""
    texts: dict[int, str]
    """by row, where a list gives for a SHA-256 what is none; the digest is then that of the text"""

    def paths(self, numbers: Numbers) -> Iterator[str]:
        """The paths of rows by their number."""
        last, folder = -1, ""
        for some in chunks(numbers):
            for row, number in zip(some.tolist(), self.folder[some].tolist(), strict=True):
                if number != last:  # neighbours mostly lie together
                    last, folder = number, self.folders[number]
                yield folder + self.names[row]

    def rows(self, numbers: Numbers) -> Iterator[Row]:
        """Rows by their number."""
        for some in chunks(numbers):
            columns = (some, self.label[some], self.split[some], self.kind[some])
            digests = self.digest[some].tobytes().hex()
            for i, (path, row, label, split, kind) in enumerate(
                zip(self.paths(some), *(column.tolist() for column in columns), strict=True)
            ):
                sha256 = digests[64 * i : 64 * i + 64] if kind == DIGEST else self.texts.get(row, "")
                yield path, self.labels[label], self.splits[split], sha256

    def with_sha256(self, known: Iterable[tuple[int, str]]) -> "Table":
        """The same table, the rows of these numbers with that SHA-256."""
        table = replace(self, digest=self.digest.copy(), kind=self.kind.copy(), texts=dict(self.texts))
        for row, sha256 in known:
            kind, digest = _digest(sha256)
            table.kind[row], table.digest[row] = kind, np.frombuffer(digest, dtype=np.uint8)
            table.texts.pop(row, None)
            if kind == TEXT:
                table.texts[row] = sha256
        return table


def chunks(numbers: Numbers) -> Iterator[Numbers]:
    """A few at a time."""
    return (numbers[i : i + CHUNK] for i in range(0, len(numbers), CHUNK))


def read_table(rows: Iterable[Row]) -> Table:
    """The table of these rows; its arrays grow in place, so that there is never a copy of them.

    Raises:
        OverflowError: there are more than 256 different sides.
    """
    folders, names, numbers = _Texts(), _Texts(), dict[bytes, int]()
    labels, splits, texts = dict[str, int](), dict[str, int](), dict[int, str]()
    folder, label, split, kinds, digests = array("i"), array("i"), array("B"), array("B"), bytearray()
    for row, (path, its_label, its_split, sha256) in enumerate(rows):
        encoded = path.encode("utf-8", ERRORS)
        cut = encoded.rfind(b"/") + 1
        if (number := numbers.get(encoded[:cut])) is None:
            if len(numbers) == MAX_FOLDERS:
                numbers.clear()
            numbers[encoded[:cut]] = number = folders.append(encoded[:cut])
        folder.append(number)
        names.append(encoded[cut:])
        label.append(labels.setdefault(its_label, len(labels)))
        split.append(splits.setdefault(its_split, len(splits)))
        kind, digest = _digest(sha256)
        kinds.append(kind)
        digests += digest
        if kind == TEXT:
            texts[row] = sha256
    return Table(
        folders=folders,
        names=names,
        folder=np.frombuffer(folder, dtype=np.int32),
        labels=tuple(labels),
        label=np.frombuffer(label, dtype=np.int32),
        splits=tuple(splits),
        split=np.frombuffer(split, dtype=np.uint8),
        digest=np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32),
        kind=np.frombuffer(kinds, dtype=np.uint8),
        texts=texts,
    )


def _digest(sha256: str) -> tuple[int, bytes]:
    if not sha256:
        return UNKNOWN, bytes(32)
    try:
        digest = unhexlify(sha256)
    except ValueError:
        digest = b""
    if len(digest) == 32 and digest.hex() == sha256:
        return DIGEST, digest
    return TEXT, hashlib.sha256(sha256.encode("utf-8", ERRORS)).digest()
