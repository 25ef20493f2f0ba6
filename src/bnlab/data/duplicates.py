"""Photos that show the same: files that are identical to the byte, and images that look the same."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bnlab.data.photo_file import PhotoReader
from bnlab.data.photos import Photo, Stamp
from bnlab.data.scan import Refusal, map_photos
from bnlab.data.verify import read_content
from bnlab.progress import Progress

# Two photos are near duplicates if their perceptual hashes differ in at most this many of 64 bits ...
MAX_BITS = 8
# ... and their 8 x 8 thumbnails by at most this much on average, in values of 0..255. The hash alone depends on
# structure only: two flat images, or two scrawled digits, may have the same.
MAX_DIFFERENCE = 12.0
# A thumbnail whose standard deviation is below this is flat. All flat images look alike, so only identical files count.
MIN_VARIATION = 4.0
# The lowest 8 of 32 frequencies of the discrete cosine transform (DCT-II), 8 x 32.
_DCT = 2 * np.cos(np.pi / 64 * np.arange(8)[:, None] * (2 * np.arange(32) + 1))


@dataclass(frozen=True, slots=True)
class Fingerprint:
    sha256: str  # of the file's bytes
    phash: int  # 64-bit perceptual hash of the upright photo
    thumbnail: bytes  # the photo at 8 x 8 pixels, RGB: 192 bytes
    stamp: Stamp | None = None  # of the file before it was read


@dataclass(frozen=True, slots=True)
class Group:
    """Two or more photos that are duplicates of each other."""

    members: tuple[int, ...]  # positions of the photos
    exact: bool  # whether all of them are identical to the byte


def fingerprint(path: str, reader: PhotoReader | None = None) -> Fingerprint:
    """Read a photo and compute its fingerprint.

    A picture of more than 8 bits a channel whose range is not known is scaled by its own largest value: by a range that
    is too large, all of them would be black, and look the same.

    Raises:
        PhotoError: the photo cannot be used.
    """
    content, image = read_content(path), (reader or PhotoReader()).open(path, own_maximum=True)
    phash = int.from_bytes(np.packbits(perceptual_hash(image)).tobytes(), "big")
    thumbnail = image.resize((8, 8), Image.Resampling.BOX).tobytes()
    return Fingerprint(content.sha256, phash, thumbnail, content.stamp)


def perceptual_hash(image: Image.Image) -> NDArray[np.bool_]:
    """The 64 bits of `imagehash.phash`: which low frequencies of the grey image, at 32 x 32, exceed their median.

    They are computed here because ImageHash imports SciPy, which takes longer than to split a few photos. Only where a
    frequency is so close to the median that rounding decides its bit, as in flat images, ImageHash computes them.
    """
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    low = _DCT @ grey @ _DCT.T  # 8 x 8
    difference = (low - np.median(low)).ravel()
    bits: NDArray[np.bool_] = difference > 0
    if np.abs(difference).min() < 1e-3:  # rounding is below 1e-7: the values are at most 4 * 32 * 32 * 255
        import imagehash

        bits = imagehash.phash(image).hash.ravel()
    return bits


def read_fingerprints(
    photos: Sequence[Photo], progress: Progress, reader: PhotoReader | None = None
) -> tuple[list[tuple[Photo, Fingerprint]], list[Refusal]]:
    """The usable photos with their fingerprints, and the photos that cannot be used."""
    refused: list[Refusal] = []
    usable = [
        (photos[i], result)
        for i, result in map_photos(photos, lambda photo: fingerprint(photo.path, reader), refused, progress)
    ]
    return usable, refused


def find_groups(fingerprints: Sequence[Fingerprint]) -> list[Group]:
    """The sets of photos that are duplicates, directly or through a chain, in the order of their first member."""
    positions: dict[str, list[int]] = {}
    for i, one in enumerate(fingerprints):
        positions.setdefault(one.sha256, []).append(i)
    files = list(positions.values())
    groups = []
    for near in _near_duplicates([fingerprints[copies[0]] for copies in files]):
        members = sorted(i for number in near for i in files[number])
        if len(members) > 1:
            groups.append(Group(tuple(members), exact=len(near) == 1))
    return sorted(groups, key=lambda group: group.members)


def group_keys(fingerprints: Sequence[Fingerprint], groups: Iterable[Group]) -> list[str]:
    """For each photo the smallest SHA-256 in its group of duplicates, or its own if it has no duplicates."""
    keys = [one.sha256 for one in fingerprints]
    for group in groups:
        smallest = min(keys[i] for i in group.members)
        for i in group.members:
            keys[i] = smallest
    return keys


def _near_duplicates(fingerprints: Sequence[Fingerprint]) -> Iterable[list[int]]:
    """All positions, grouped: near duplicates, directly or through a chain, are in one group.

    Hashes that differ in at most MAX_BITS bits agree in at least one of MAX_BITS + 1 bands of bits. So only photos that
    agree in a band are compared, each pair once, and no pair that is already known to be in one group.
    """
    group = np.arange(len(fingerprints))
    members = {i: [i] for i in range(len(fingerprints))}
    hashes = np.array([one.phash for one in fingerprints], dtype=np.uint64)
    thumbnails = np.frombuffer(b"".join(one.thumbnail for one in fingerprints), dtype=np.uint8).reshape(-1, 64, 3)
    varied = np.flatnonzero(thumbnails.std(axis=1).max(axis=1) >= MIN_VARIATION)
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
                for earlier in masks[:number]:  # pairs that agree in an earlier band have been compared
                    others = others[(hashes[others] ^ hashes[i]) & earlier != 0]
                if len(others):
                    difference = np.abs(thumbnails[others].astype(np.int16) - thumbnails[i]).mean(axis=(1, 2))
                    _merge(group, members, group[i], group[others[difference <= MAX_DIFFERENCE]])
    return members.values()


def _merge(group: NDArray[np.intp], members: dict[int, list[int]], one: int, others: NDArray[np.intp]) -> None:
    """Merge a group with others. The smaller one is renumbered, so that each photo is renumbered few times."""
    for other in map(int, np.unique(others)):
        small, large = sorted((int(one), other), key=lambda number: len(members[number]))
        group[members[small]] = large
        members[large] += members.pop(small)
        one = large
