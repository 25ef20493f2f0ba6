"""Photos that are the same picture: to the byte, or to the eye."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bnlab.data.preprocess import open_photo
from bnlab.files import file_sha256

# Two photos are near duplicates when their perceptual hashes differ in at most so many of 64 bits ...
MAX_BITS = 8
# ... and their 8 x 8 miniatures by at most so much a value (of 255) on average. The hash alone sees structure and
# takes two flat pictures, or two scrawled digits, for one.
MAX_DIFFERENCE = 12.0
# What varies less than this is flat: all flat pictures look alike, so only identical files count.
MIN_VARIATION = 4.0


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What tells photos apart without looking at them again."""

    sha256: str
    """of the file's bytes"""
    phash: int
    """64-bit perceptual hash of the upright picture"""
    miniature: bytes
    """the picture at 8 x 8 pixels, RGB: 192 bytes"""


@dataclass(frozen=True, slots=True)
class Group:
    """Photos that belong together, by their positions; at least two."""

    members: tuple[int, ...]
    exact: bool
    """all of them are identical to the byte"""


def fingerprint(path: str) -> Fingerprint:
    """Read a photo whole and take its fingerprint.

    Raises:
        PhotoError: the photo cannot be used.
    """
    import imagehash

    image = open_photo(path)
    bits = imagehash.phash(image).hash.ravel()
    miniature = image.resize((8, 8), Image.Resampling.BOX).tobytes()
    return Fingerprint(file_sha256(path), int.from_bytes(np.packbits(bits).tobytes(), "big"), miniature)


def find_groups(fingerprints: Sequence[Fingerprint]) -> list[Group]:
    """The sets of photos that are duplicates, directly or by a chain, in the order of their first member."""
    numbers: dict[str, int] = {}
    exact = np.array([numbers.setdefault(one.sha256, len(numbers)) for one in fingerprints], dtype=np.intp)
    first = np.unique(exact, return_index=True)[1]
    near = _near_groups([fingerprints[i] for i in first])[exact]

    members: dict[int, list[int]] = {}
    for i, number in enumerate(near):
        members.setdefault(int(number), []).append(i)
    return [
        Group(tuple(group), exact=len({fingerprints[i].sha256 for i in group}) == 1)
        for group in members.values()
        if len(group) > 1
    ]


def _near_groups(fingerprints: Sequence[Fingerprint]) -> NDArray[np.intp]:
    """The number of each photo's group: near duplicates, and what a chain of them joins, have the same.

    Hashes that differ in at most MAX_BITS bits agree in at least one of MAX_BITS + 1 bands of bits, so only photos
    that share a band are compared, each pair once, and none that is known already to belong together.
    """
    group = np.arange(len(fingerprints))
    members = {i: [i] for i in range(len(fingerprints))}
    if not fingerprints:
        return group
    hashes = np.array([one.phash for one in fingerprints], dtype=np.uint64)
    miniatures = np.array([np.frombuffer(one.miniature, dtype=np.uint8) for one in fingerprints])
    varied = np.flatnonzero(miniatures.reshape(-1, 64, 3).std(axis=1).max(axis=1) >= MIN_VARIATION)
    edges = [int(edge) for edge in np.linspace(0, 64, MAX_BITS + 2)]
    masks = [np.uint64((1 << high) - (1 << low)) for low, high in pairwise(edges)]
    for number, mask in enumerate(masks):
        band = hashes & mask
        order = varied[np.argsort(band[varied], kind="stable")]
        for bucket in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            for k, i in enumerate(bucket[:-1]):
                others = bucket[k + 1 :]
                others = others[group[others] != group[i]]
                others = others[np.bitwise_count(hashes[others] ^ hashes[i]) <= MAX_BITS]
                for earlier in masks[:number]:  # these were compared when that band's turn was
                    others = others[(hashes[others] ^ hashes[i]) & earlier != 0]
                if len(others):
                    difference = np.abs(miniatures[others].astype(np.int16) - miniatures[i]).mean(axis=1)
                    _join(group, members, group[i], group[others[difference <= MAX_DIFFERENCE]])
    return group


def _join(group: NDArray[np.intp], members: dict[int, list[int]], one: int, others: NDArray[np.intp]) -> None:
    """Let groups become one; it is always the smaller that is renumbered, so each photo is few times."""
    for other in map(int, np.unique(others)):
        small, large = sorted((int(one), other), key=lambda number: len(members[number]))
        if small != large:
            group[members[small]] = large
            members[large] += members.pop(small)
            one = large
