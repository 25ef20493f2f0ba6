"""Which photo is train, val or test: decided by its content and the seed alone, so that it never moves.

A photo's side follows from a hash of the seed and its SHA-256. Others may come or go: it stays. Duplicates share the
side of the one among them whose SHA-256 is smallest, so only a photo's own duplicates can move it.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bnlab.data import duplicates
from bnlab.data.duplicates import Fingerprint, Group
from bnlab.data.photos import Photo
from bnlab.data.scan import PhotoFile, Refusal, map_usable_photos, report_ignored_files, scan, split_folders
from bnlab.data.split_csv import check_classes, count_photos
from bnlab.errors import DataError, plural, printable, quoted
from bnlab.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Split:
    """A folder of classes, split."""

    folder: Path
    photos: list[Photo]
    """in the order of their class and path"""
    refused: list[Refusal]
    groups: list[Group]
    """duplicates, by position in `photos`"""

    @property
    def conflicts(self) -> list[Group]:
        """Groups of duplicates whose members stand in different classes: at least one label is wrong."""
        return [group for group in self.groups if len({self.photos[i].label for i in group.members}) > 1]

    def counts(self) -> dict[str, dict[str, int]]:
        """Class to split to number of photos."""
        return count_photos(self.photos)


def assign_split(sha256: str, *, val: float, test: float, seed: int) -> str:
    """The side of a photo with this content: a number in [0, 1) hashed from it, held against `val` and `val + test`."""
    digest = hashlib.sha256(f"{seed}:{sha256}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    return "val" if draw < val else "test" if draw < val + test else "train"


def split_folder(folder: Path, *, val: float, test: float, seed: int, progress: Progress) -> Split:
    """Read every photo of a folder of classes and decide its side.

    Raises:
        DataError: no such folder, one split already, no or one class, an empty class, or too few photos.
    """
    if not (val >= 0 and test >= 0 and 0 < val + test < 1):
        raise DataError(
            f"val {val} and test {test} leave nothing to split", "give shares that add up to between 0 and 1"
        )
    if split_folders(folder):
        raise DataError(f"{printable(folder)} is split already", f"train on it: bnlab train {quoted(folder)}")
    found = scan(folder)
    report_ignored_files(folder, progress)
    return split_found(folder, found, val=val, test=test, seed=seed, progress=progress)


def split_found(
    folder: Path, found: Sequence[PhotoFile], *, val: float, test: float, seed: int, progress: Progress
) -> Split:
    """Decide the sides of photos that were found in a folder.

    Raises:
        DataError: one class only, a class without a usable photo, or too few photos.
    """
    examined, refused = map_usable_photos(
        found, duplicates.fingerprint, title="reading photos", total=len(found), progress=progress
    )
    groups = duplicates.find_groups([fingerprint for _, fingerprint in examined])
    photos = assign(examined, groups, val=val, test=test, seed=seed)
    _check(folder, found, photos, refused, val=val, test=test)
    return Split(folder=folder, photos=photos, refused=refused, groups=groups)


def assign(
    examined: Sequence[tuple[PhotoFile, Fingerprint]], groups: Iterable[Group], *, val: float, test: float, seed: int
) -> list[Photo]:
    """The photos with their sides, each group of duplicates on one."""
    primary = [fingerprint.sha256 for _, fingerprint in examined]
    for group in groups:
        smallest = min(primary[i] for i in group.members)
        for i in group.members:
            primary[i] = smallest
    return [
        Photo(found.path, found.label, assign_split(key, val=val, test=test, seed=seed), fingerprint.sha256)
        for (found, fingerprint), key in zip(examined, primary, strict=True)
    ]


def _check(
    folder: Path, found: Iterable[PhotoFile], photos: list[Photo], refused: list[Refusal], *, val: float, test: float
) -> None:
    name = printable(folder)
    counts = count_photos(photos)
    labels = sorted({one.label for one in found})
    for label in labels:
        if label not in counts:
            reason = next(refusal.reason for refusal in refused if refusal.label == label)
            raise DataError(
                f"class '{printable(label)}' in {name} has no photo that can be used (the first: {reason})",
                "replace its photos or remove the folder",
            )
    check_classes(labels, name)
    for label in labels:
        if not counts[label]["train"]:
            number = sum(counts[label].values())
            raise DataError(
                f"class '{printable(label)}' in {name} has {plural(number, 'photo')}, and none fell to train",
                "add photos, hold out less or take another --seed",
            )
    for wanted, split in ((val, "val"), (test, "test")):
        if wanted and not any(counts[label][split] for label in labels):
            raise DataError(
                f"{name} has {len(photos)} photos, too few for a {split} share of {wanted}: none fell to it",
                f"add photos, raise --{split} or take another --seed",
            )
