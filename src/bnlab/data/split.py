"""Assign photos to train, val and test by their content and the seed alone, so that a photo never changes its split.

The split of a photo follows from a hash of the seed and the photo's SHA-256. It stays the same when other photos are
added or removed. Duplicates are assigned by the smallest SHA-256 among them, so only a photo's own duplicates can move
it.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bnlab.data import duplicates
from bnlab.data.duplicates import Fingerprint, Group
from bnlab.data.photos import Photo
from bnlab.data.scan import Refusal, report_ignored_files, scan, split_folders
from bnlab.data.split_csv import check_classes, count_photos
from bnlab.errors import DataError, plural, printable, quoted
from bnlab.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Split:
    """A folder of classes whose photos are assigned to splits."""

    folder: Path
    photos: list[Photo]
    """in the order of their class and path"""
    refused: list[Refusal]
    groups: list[Group]
    """duplicates, as positions in `photos`"""

    @property
    def conflicts(self) -> list[Group]:
        """Groups of duplicates with members in several classes: at least one label is wrong."""
        return [group for group in self.groups if len({self.photos[i].label for i in group.members}) > 1]

    def counts(self) -> dict[str, dict[str, int]]:
        """Number of photos by class and split."""
        return count_photos(self.photos)


def assign_split(sha256: str, *, val: float, test: float, seed: int) -> str:
    """The split of a photo with this content.

    A number that is uniform in [0, 1) is hashed from the seed and the content: below `val` it is val, below
    `val + test` test, and else train.
    """
    digest = hashlib.sha256(f"{seed}:{sha256}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    return "val" if draw < val else "test" if draw < val + test else "train"


def split_folder(folder: Path, *, val: float, test: float, seed: int, progress: Progress) -> Split:
    """Read every photo of a folder of classes and assign it to a split.

    Raises:
        DataError: the folder is missing, already split, or has too few classes or photos.
    """
    if not (val >= 0 and test >= 0 and 0 < val + test < 1):
        raise DataError(
            f"val {val} and test {test} leave nothing to split", "use fractions that add up to between 0 and 1"
        )
    if split_folders(folder):
        raise DataError(f"{printable(folder)} is already split", f"train on it with `bnlab train {quoted(folder)}`")
    files = scan(folder)
    report_ignored_files(folder, progress)
    return split_files(folder, files, val=val, test=test, seed=seed, progress=progress)


def split_files(
    folder: Path, photos: Sequence[Photo], *, val: float, test: float, seed: int, progress: Progress
) -> Split:
    """Read these photos of a folder and assign them to splits.

    Raises:
        DataError: there is only one class, a class without a usable photo, or too few photos.
    """
    usable, refused = duplicates.read_fingerprints(photos, progress)
    groups = duplicates.find_groups([fingerprint for _, fingerprint in usable])
    assigned = assign_splits(usable, groups, val=val, test=test, seed=seed)
    _check_counts(folder, assigned, refused, val=val, test=test)
    return Split(folder=folder, photos=assigned, refused=refused, groups=groups)


def assign_splits(
    usable: Sequence[tuple[Photo, Fingerprint]], groups: Iterable[Group], *, val: float, test: float, seed: int
) -> list[Photo]:
    """The photos with their splits. All members of a group of duplicates are assigned to the same one."""
    keys = duplicates.group_keys([fingerprint for _, fingerprint in usable], groups)
    return [
        Photo(photo.path, photo.label, assign_split(key, val=val, test=test, seed=seed), fingerprint.sha256)
        for (photo, fingerprint), key in zip(usable, keys, strict=True)
    ]


def _check_counts(folder: Path, photos: list[Photo], refused: list[Refusal], *, val: float, test: float) -> None:
    name = printable(folder)
    counts = count_photos(photos)
    for refusal in sorted(refused, key=lambda refusal: refusal.label):
        if refusal.label not in counts:
            raise DataError(
                f"class '{printable(refusal.label)}' in {name} has no usable photo (the first: {refusal.reason})",
                "replace its photos or remove the folder",
            )
    check_classes(list(counts), name)
    for label, numbers in counts.items():
        if not numbers["train"]:
            raise DataError(
                f"class '{printable(label)}' in {name} has {plural(sum(numbers.values()), 'photo')}, "
                f"and none was assigned to train",
                "add photos, hold out fewer or use another --seed",
            )
    for fraction, split in ((val, "val"), (test, "test")):
        if fraction and not any(numbers[split] for numbers in counts.values()):
            raise DataError(
                f"{name} has {len(photos)} photos, too few for a {split} fraction of {fraction}: none was assigned",
                f"add photos, raise --{split} or use another --seed",
            )
