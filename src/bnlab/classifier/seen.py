"""Which photos a classifier has seen: in its training, and in the earlier trainings from whose weights it started.

A photo is known by the first 8 bytes of its file's SHA-256: 11 characters a photo in a classifier file, which has
neither paths nor names of photos. Among a million photos, two with other contents have the same 8 bytes with a
probability of 3e-8. Near duplicates have other contents, and are not found.
"""

import base64
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import field
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, ConfigDict
from pydantic.dataclasses import dataclass

from bnlab.data.photos import Photo, Photos
from bnlab.data.split_csv import SPLITS
from bnlab.files import file_sha256

_BYTES = 8
_MOST = 8_000_000  # photos: the header of a safetensors file has at most 100 MB

# Like the card that contains them, these may come from anywhere.
CHECKED = ConfigDict(extra="ignore", allow_inf_nan=False)


def _check_digests(text: str) -> str:
    with suppress(ValueError):
        if len(base64.b64decode(text, validate=True)) % _BYTES == 0:
            return text
    raise ValueError(f"it must be base64 of {_BYTES} bytes a photo")


Digests = Annotated[str, AfterValidator(_check_digests)]
"""Base64 of the first 8 bytes of photos' SHA-256, sorted, each once."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Ancestor:
    """A finished training from whose weights a later one started."""

    split_sha256: str = ""
    """SHA-256 of its split.csv; empty if it is not known"""
    photos: Mapping[str, int] = field(default_factory=dict)
    """number of photos by split; empty if it is not known"""
    classes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class SeenPhotos:
    """What a classifier and all its ancestors were trained on, and the photos by which a best epoch was chosen."""

    train: Digests = field(default="", repr=False)
    val: Digests = field(default="", repr=False)
    complete: bool = False
    """whether there are no others; False for imported weights, about which nothing is known"""

    @classmethod
    def of(cls, photos: Photos) -> "SeenPhotos":
        """Those of a training on these photos."""
        if len(photos) > _MOST:
            return cls()
        parts = {split: _encode(photos.in_split(split).prefixes) for split in ("train", "val")}
        return cls(**parts, complete=bool(photos.in_split("train", "val").hashed.all()))

    def __or__(self, other: "SeenPhotos") -> "SeenPhotos":
        both = {split: np.union1d(self.prefixes(split), other.prefixes(split)) for split in ("train", "val")}
        if sum(map(len, both.values())) > _MOST:
            return SeenPhotos()
        parts = {split: _encode(prefixes) for split, prefixes in both.items()}
        return SeenPhotos(**parts, complete=self.complete and other.complete)

    def prefixes(self, split: Literal["train", "val"] | str) -> NDArray[np.uint64]:
        return np.frombuffer(base64.b64decode(getattr(self, split)), dtype="<u8")

    def count(self, photos: Photos) -> "SeenCount":
        """How many of these photos were seen. Those whose SHA-256 is not known count as not seen."""
        known = photos[photos.hashed].prefixes
        in_train = np.isin(known, self.prefixes("train"))
        in_val = np.isin(known, self.prefixes("val")) & ~in_train
        return SeenCount(n=len(photos), train=int(in_train.sum()), val=int(in_val.sum()), complete=self.complete)

    def count_files(self, paths: Sequence[str]) -> "SeenCount":
        """How many of these photos were seen, by what their files hold now."""
        if not self.train and not self.val:  # no photo needs to be read
            return SeenCount(n=len(paths), train=0, val=0, complete=self.complete)
        return self.count(Photos.of(Photo(path, "", "", _sha256_or_none(path)) for path in paths))


@dataclass(frozen=True, kw_only=True)
class SeenCount:
    """How many of `n` photos were seen. If `complete` is False, there may be more."""

    n: int
    train: int
    """photos that were trained on"""
    val: int
    """other photos, by which a best epoch was chosen"""
    complete: bool

    def known(self, split: Literal["train", "val"]) -> int | None:
        """A number that is certain to be seen, or None where nothing is known: 0 would be taken for none."""
        number: int = getattr(self, split)
        return number if number or self.complete else None

    def sentences(self, who: str, what: str = "photos") -> list[str]:
        """What to know of an accuracy on these photos; `who` is "it was" or "its members were"."""
        least = "" if self.complete else "at least "
        lines = []
        for number, why in ((self.train, f"{who} trained on"), (self.val, f"by which {who} chosen as the best epoch")):
            if number:
                lines.append(f"{least}{number} of {self.n} {what} {'is' if number == 1 else 'are'} among those {why}")
        if not self.complete and not lines:
            lines.append(f"which photos {who} trained on is unknown")
        return lines


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class History:
    """The trainings before a training, the first one first, and the photos that they saw."""

    ancestors: tuple[Ancestor, ...]
    seen: SeenPhotos


NO_HISTORY = History(ancestors=(), seen=SeenPhotos(complete=True))
UNKNOWN_HISTORY = History(ancestors=(), seen=SeenPhotos())


def union(of: Sequence[SeenPhotos]) -> SeenPhotos:
    """The photos that any of several classifiers has seen."""
    return reduce(or_, of)


def photos_by_split(photos: Photos) -> dict[str, int]:
    return {split: len(photos.in_split(split)) for split in SPLITS}


def _encode(prefixes: NDArray[np.uint64]) -> Any:
    return base64.b64encode(np.unique(prefixes).astype("<u8").tobytes()).decode("ascii")


def _sha256_or_none(path: str) -> str:
    try:
        return file_sha256(path)
    except OSError:  # it was removed after it was classified
        return ""
