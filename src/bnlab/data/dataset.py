"""What DATA can be: a split folder, a split.csv, or a plain folder of classes.

A split folder has the sub-folders `train`, `val` (or `valid`, `validation`) and perhaps `test`, each with one folder a
class. Classes are matched by name, never by position.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from bnlab.data.photos import Photo, Photos
from bnlab.data.preprocess import open_photo
from bnlab.data.scan import (
    PhotoFile,
    Refusal,
    class_folders,
    map_photos,
    photos_below,
    report_ignored_files,
    scan,
    split_folders,
)
from bnlab.data.split import split_folder, split_found
from bnlab.data.split_csv import SPLIT_CSV, as_label, check_classes, read_split_csv
from bnlab.errors import DataError, PhotoError, plural, printable, quoted
from bnlab.files import file_sha256
from bnlab.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The photos of DATA, ready to train on."""

    classes: tuple[str, ...]
    """names of the classes of train, sorted: the position of a name is its index in the network"""
    photos: Photos
    refused: tuple[Refusal, ...] = ()
    own_val: bool = True
    """whether DATA has a val side of its own, or a share was held out"""

    def in_split(self, split: str) -> Photos:
        """The photos of train, val or test."""
        return self.photos.in_split(split)


def open_training_data(data: Path, *, val: float, seed: int, progress: Progress) -> Dataset:
    """The photos of DATA with their sides; a plain folder is split on the fly, as `bnlab split` would.

    Photos are read once to see that they can be used, except those a split.csv gives the SHA-256 of. Where there is no
    val side, a share of train is held out as `bnlab split` would.

    Raises:
        DataError: DATA is nothing to train on; the message says why.
    """
    if listed := _list_in(data):
        photos, refused = _usable(read_split_csv(listed), progress)
    elif sides := split_folders(data):
        photos, refused = _usable(_of_sides(data, sides, progress), progress)
    else:
        split = split_folder(data, val=val, test=0.0, seed=seed, progress=progress)
        _tell_conflicts(len(split.conflicts), data, progress)
        return _checked(data, split.photos, split.refused, own_val=False)
    own_val = "val" in photos.splits
    if not own_val:
        progress.note(f"{printable(data)} has no val side: {val:.0%} of train is held out")
        train = [PhotoFile(photo.path, photo.label) for photo in photos.in_split("train")]
        split = split_found(data, train, val=val, test=0.0, seed=seed, progress=progress)
        photos = Photos.of(chain(split.photos, photos.take(np.flatnonzero(~photos.is_in_split("train")))))
        refused += split.refused
    _tell_leaks(photos, progress)
    return _checked(data, photos, refused, own_val=own_val)


def open_recorded_data(path: Path) -> Dataset:
    """The photos of a run's own split.csv, which was checked when the run began.

    Raises:
        DataError: the list cannot be read, or a photo that is trained or judged on is no longer there.
    """
    photos = read_split_csv(path)
    for photo in photos.take(np.flatnonzero(~photos.is_in_split("test"))).paths:
        if not os.path.isfile(photo):  # noqa: PTH113 (a Path for each of a million files is slow)
            raise DataError(f"{printable(photo)} is gone, and the run was trained on it", "put it back to resume")
    return _checked(path, photos, [])


def open_evaluation_data(data: Path, split: str | None) -> tuple[str, Photos]:
    """The photos to evaluate on and the name of the side read: `split`, or the first of test, val and all there is.

    A plain folder of classes has one side, "all".

    Raises:
        DataError: DATA is nothing to evaluate on, or has no such side.
    """
    if listed := _list_in(data):
        photos = read_split_csv(listed)
    elif sides := split_folders(data):
        photos = Photos.of(_listed(sides))
    else:
        photos = Photos.of(Photo(found.path, found.label, "all", "") for found in scan(data))
    if not photos:
        raise DataError(f"{printable(data)} has no photos", "give a split folder, a split.csv or a folder of classes")
    there = photos.splits
    if split == "all":
        return "all", photos
    chosen = split or next(name for name in ("test", "val", "train", "all") if name in there)
    if chosen not in there:
        raise DataError(
            f"{printable(data)} has no {printable(chosen)} side", f"say --split {' or '.join(sorted(there | {'all'}))}"
        )
    return chosen, photos.in_split(chosen)


def _list_in(data: Path) -> Path | None:
    """The split.csv that DATA is, or that of a run, or all that DATA holds."""
    if data.is_file():
        return data
    listed = data / SPLIT_CSV
    is_run = (data / "recipe.yaml").is_file()
    return listed if listed.is_file() and (is_run or not class_folders(data)) else None


def _listed(sides: Iterable[tuple[str, Path]]) -> Iterator[Photo]:
    return (
        Photo(photo, as_label(label), side_name, "")
        for side_name, folder in sides
        for label, path in class_folders(folder).items()
        for photo in photos_below(path)
    )


def _of_sides(data: Path, sides: Sequence[tuple[str, Path]], progress: Progress) -> Photos:
    """The photos of a split folder, with the SHA-256 that its split.csv knows."""
    photos = Photos.of(_listed(sides))
    train = next(folder for name, folder in sides if name == "train")
    filled = photos.in_split("train").labels
    for label, path in class_folders(train).items():
        if as_label(label) not in filled:
            raise DataError(
                f"class '{printable(label)}' has no photos in {printable(path)}", "add some or remove the folder"
            )
    for _, folder in sides:
        report_ignored_files(folder, progress)
    others = sorted(class_folders(data).keys() - {folder.name for _, folder in sides})
    if others:
        names = ", ".join(map(printable, others[:5]))
        progress.warn(f"{printable(data)} has folders beside its sides, which are left out: {names}")
    return photos.with_sha256_of(read_split_csv(data / SPLIT_CSV)) if (data / SPLIT_CSV).is_file() else photos


def _usable(photos: Photos, progress: Progress) -> tuple[Photos, list[Refusal]]:
    """The photos that can be used: those without a SHA-256 are read to see, the others must only be there."""
    refused: list[Refusal] = []
    usable, hashed = np.ones(len(photos), dtype=np.bool_), photos.hashed
    unknown, listed = np.flatnonzero(~hashed), photos.take(np.flatnonzero(hashed))

    def read() -> Iterator[tuple[int, str]]:
        found = (PhotoFile(photo.path, photo.label) for photo in photos.take(unknown))
        looks = map_photos(found, _usable_sha256, title="reading photos", total=len(unknown), progress=progress)
        for i, (one, result) in zip(unknown.tolist(), looks, strict=True):
            if isinstance(result, PhotoError):
                usable[i] = False
                refused.append(Refusal(one.path, result.reason, one.label))
            else:
                yield i, result

    if len(unknown):
        photos = photos.with_sha256(read())
    for i, path in zip(np.flatnonzero(hashed), listed.paths, strict=True):
        if not os.path.isfile(path):  # noqa: PTH113 (a Path for each of a million files is slow)
            usable[i] = False
            refused.append(Refusal(path, "there is no such file", photos[int(i)].label))
    return photos.take(np.flatnonzero(usable)), refused


def _usable_sha256(path: str) -> str:
    open_photo(path)
    return file_sha256(path)


def _tell_leaks(photos: Photos, progress: Progress) -> None:
    train = photos.is_in_split("train")
    leaked = photos.take(np.flatnonzero(~train)).count_shared(photos.take(np.flatnonzero(train)))
    if leaked:
        progress.warn(f"val and test share {plural(leaked, 'photo')} with train, to the byte: accuracy will flatter")


def _tell_conflicts(number: int, data: Path, progress: Progress) -> None:
    if number:
        progress.warn(
            f"{plural(number, 'group')} of duplicates in more than one class: "
            f"`bnlab split {quoted(data)} --list --into FOLDER` names them"
        )


def _checked(data: Path, listed: Iterable[Photo], refused: Iterable[Refusal], *, own_val: bool = True) -> Dataset:
    photos = Photos.of(listed)
    name = printable(data)
    twice = photos.first_repeated_path()
    if twice is not None:
        raise DataError(f"{name} lists {printable(twice)} more than once", "a photo has one class and one side")
    classes = photos.in_split("train").labels
    check_classes(classes, f"train of {name}" if classes else name)
    for split in ("val", "test"):
        unknown = sorted(set(photos.in_split(split).labels) - set(classes))
        if unknown:
            raise DataError(
                f"{split} of {name} has the class '{printable(unknown[0])}', which train has not",
                f"add photos of it to train or take it out of {split}",
            )
    dataset = Dataset(classes=tuple(classes), photos=photos, refused=tuple(refused), own_val=own_val)
    if not dataset.in_split("val"):
        raise DataError(f"{name} has no photo left for val", "add photos or hold out more")
    return dataset
