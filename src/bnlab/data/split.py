"""Split a folder of classes: assign its photos to train, val and test, and write the split to a folder.

The split of a photo follows from a number that is hashed from the seed and the photo's SHA-256. It stays the same when
other photos are added or removed. Duplicates are assigned by the smallest SHA-256 among them, so only a photo's own
duplicates can change its number.

This leaves some split of a small class without a photo now and then. Such a class, and no other, gives that split the
photo whose number is nearest. So each class of enough photos has one or more in each split, and at most two of its
photos (with their duplicates) are not where their number alone would place them. Duplicates in several classes are not
moved.
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from bnlab.data import duplicates
from bnlab.data.duplicates import Group
from bnlab.data.photo_file import PhotoReader
from bnlab.data.photos import Photo
from bnlab.data.scan import Refusal, check_classes, report_ignored_files, scan, split_folders
from bnlab.data.split_csv import SPLIT_CSV, count_photos, read_split_csv, write_split_csv
from bnlab.errors import DataError, plural, printable, quoted
from bnlab.files import new_folder, storage_errors, write_csv
from bnlab.progress import Progress

LinkMode = Literal["link", "copy", "list"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """A folder of classes whose photos are assigned to splits."""

    folder: Path
    photos: list[Photo] = field(repr=False)  # in the order of their class and path
    refused: list[Refusal] = field(repr=False)
    groups: list[Group] = field(repr=False)  # duplicates, as positions in `photos`

    @property
    def conflicts(self) -> list[Group]:
        """Groups of duplicates with members in several classes: at least one label is wrong."""
        return [group for group in self.groups if len({self.photos[i].label for i in group.members}) > 1]

    def counts(self) -> dict[str, dict[str, int]]:
        return count_photos(self.photos)


def split_of_number(number: float, *, val: float, test: float) -> str:
    """The split of a photo with this number in [0, 1): below `val` it is val, below `val + test` test, else train."""
    return "val" if number < val else "test" if number < val + test else "train"


def hashed_number(sha256: str, seed: int) -> float:
    """A number that is uniform in [0, 1), hashed from the seed and the content."""
    digest = hashlib.sha256(f"{seed}:{sha256}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def assign_splits(photos: Sequence[tuple[str, str]], *, val: float, test: float, seed: int) -> list[str]:
    """The splits of photos, each given by its class and by the key of its duplicates, see `duplicates.group_keys`.

    Photos of one key count as one. A class of at least three (two if only val or only test is held out) has one or more
    in each split. One of two has them in train and val; one of a single photo has it in train.
    """
    numbers = {key: hashed_number(key, seed) for _, key in photos}
    splits = {key: split_of_number(number, val=val, test=test) for key, number in numbers.items()}
    classes: dict[str, set[str]] = {}
    labels: dict[str, set[str]] = {}
    for label, key in photos:
        classes.setdefault(label, set()).add(key)
        labels.setdefault(key, set()).add(label)
    ranges = (
        {"train": (val + test, 1.0)}
        | ({"val": (0.0, val)} if val else {})
        | ({"test": (val, val + test)} if test else {})
    )
    for keys in classes.values():
        movable = sorted(key for key in keys if len(labels[key]) == 1)
        needed = list(ranges)[: len(keys)]  # the first matter most
        for split in needed:
            count = Counter(splits[key] for key in keys)
            # A needed split keeps its last photo.
            spare = [key for key in movable if splits[key] not in needed or count[splits[key]] > 1]
            if not count[split] and spare:
                low, high = ranges[split]
                nearest = min(spare, key=lambda key: max(low - numbers[key], numbers[key] - high))
                splits[nearest] = split
    return [splits[key] for _, key in photos]


def split_folder(
    folder: Path, *, val: float, test: float, seed: int, progress: Progress, reader: PhotoReader | None = None
) -> Split:
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
    unreadable: list[Refusal] = []
    files = scan(folder, unreadable)
    report_ignored_files(folder, progress)
    split = split_files(folder, files, val=val, test=test, seed=seed, progress=progress, reader=reader)
    return replace(split, refused=[*unreadable, *split.refused])


def split_files(
    folder: Path,
    photos: Sequence[Photo],
    *,
    val: float,
    test: float,
    seed: int,
    progress: Progress,
    reader: PhotoReader | None = None,
) -> Split:
    """Read these photos of a folder and assign them to splits.

    Raises:
        DataError: there is only one class, a class without a usable photo, or too few photos.
    """
    usable, refused = duplicates.read_fingerprints(photos, progress, reader)
    groups = duplicates.find_groups([fingerprint for _, fingerprint in usable])
    keys = duplicates.group_keys([fingerprint for _, fingerprint in usable], groups)
    labelled = [(photo.label, key) for (photo, _), key in zip(usable, keys, strict=True)]
    assigned = [
        Photo(photo.path, photo.label, split, one.sha256, one.stamp)
        for (photo, one), split in zip(usable, assign_splits(labelled, val=val, test=test, seed=seed), strict=True)
    ]
    _check_counts(folder, assigned, refused, val=val, test=test)
    return Split(folder=folder, photos=assigned, refused=refused, groups=groups)


def write_split(split: Split, into: Path, mode: LinkMode, progress: Progress) -> bool:
    """Write the split to the folder `into`; return False if the very same split is there already.

    - "link": hard links `into/train/<class>/...` (copies if the file system has no hard links), with `split.csv` and
      `findings.csv` (photos that were refused, and duplicates).
    - "copy": the same with copies.
    - "list": `into/split.csv` alone.

    Raises:
        DataError: `into` holds something else, or lies within the photos.
        StorageError: no space left or no permission; nothing is left behind.
    """
    _check_target(split.folder, into)
    rows = [_row(split, photo, mode) for photo in split.photos]
    if into.is_dir() and any(into.iterdir()):
        _check_same(split, rows, into, mode)
        return False
    with new_folder(into) as draft:
        if mode != "list":
            title = "copying photos" if mode == "copy" else "linking photos"
            with storage_errors(into), progress.task(title, len(rows), "photos") as task:
                for photo, row in zip(split.photos, rows, strict=True):
                    _write_photo(photo.path, draft / row.path, mode)
                    task.advance()
            write_csv(draft / "findings.csv", ("finding", "group", "path", "class", "detail"), _findings(split))
        write_split_csv(draft / SPLIT_CSV, rows, absolute=False)
    return True


def _check_counts(folder: Path, photos: list[Photo], refused: list[Refusal], *, val: float, test: float) -> None:
    name = printable(folder)
    counts = count_photos(photos)
    for refusal in sorted(refused, key=lambda refusal: refusal.label):
        if refusal.label not in counts:
            raise DataError(
                f"class '{printable(refusal.label)}' in {name} has no usable photo (the first: {refusal.reason})",
                "replace its photos or remove the folder",
            )
    check_classes(list(counts), name, folder)
    for label, numbers in counts.items():
        if not numbers["train"]:
            raise DataError(
                f"class '{printable(label)}' in {name} has {plural(sum(numbers.values()), 'photo')}, all duplicates of "
                f"photos in other classes, and none was assigned to train",
                "add photos, correct their classes or use another seed (of train: split_seed)",
            )
    for fraction, split in ((val, "val"), (test, "test")):
        if fraction and not any(numbers[split] for numbers in counts.values()):
            raise DataError(
                f"{name} has {len(photos)} photos, and in no class enough that differ: none was assigned to {split}",
                "add photos to each class",
            )


def _check_target(photos: Path, into: Path) -> None:
    source, target = photos.resolve(), into.resolve()
    if target.is_relative_to(source):
        raise DataError(
            f"{printable(into)} lies within {printable(photos)}, which is never written to",
            "use another folder for into",
        )
    if source.is_relative_to(target):
        raise DataError(f"{printable(into)} contains {printable(photos)} itself", "use a new folder for into")
    if into.exists() and not into.is_dir():
        raise DataError(f"{printable(into)} is a file", "use a new folder for into")


def _row(split: Split, photo: Photo, mode: LinkMode) -> Photo:
    """The photo as split.csv lists it: with an absolute path for "list", else with its path in the new folder."""
    if mode == "list":
        return replace(photo, path=os.path.abspath(photo.path))  # noqa: PTH100 (symbolic links are kept)
    relative = Path(os.path.relpath(photo.path, split.folder)).as_posix()
    return replace(photo, path=f"{photo.split}/{relative}")


def _check_same(split: Split, rows: list[Photo], into: Path, mode: LinkMode) -> None:
    """Refuse a folder that holds anything but this split in this mode."""
    name, remedy = printable(into), "use a new folder for into, or remove this one"
    if not (into / SPLIT_CSV).is_file():
        raise DataError(f"{name} exists and is not a split that bnlab wrote", remedy)
    if list(read_split_csv(into / SPLIT_CSV)) != [replace(row, path=str(into / row.path)) for row in rows]:
        raise DataError(
            f"{name} holds another split (other photos, val, test or seed, or a list without photos)", remedy
        )
    if mode == "list":
        return
    for photo, row in zip(split.photos, rows, strict=True):
        path = into / row.path
        if not path.is_file():
            raise DataError(f"{name} is a split that lacks {printable(row.path)}", remedy)
        if mode == "copy" and path.samefile(photo.path):
            raise DataError(f"{name} holds the same split as links, not copies", remedy)


def _write_photo(source: str, target: Path, mode: LinkMode) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if mode == "link":
        with suppress(OSError):  # another file system, or one without hard links: copy
            os.link(os.path.realpath(source), target)
            return
    shutil.copy2(source, target)


def _findings(split: Split) -> Iterator[tuple[str, object, str, str, str]]:
    for refusal in split.refused:
        yield "refused", "", refusal.path, "", refusal.reason
    conflicts = set(split.conflicts)
    for number, group in enumerate(split.groups, start=1):
        kind = "label conflict" if group in conflicts else "duplicate"
        detail = "identical to the byte" if group.exact else "alike to the eye"
        for i in group.members:
            yield kind, number, split.photos[i].path, split.photos[i].label, detail
