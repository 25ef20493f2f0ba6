"""What DATA can be: a split folder, a split.csv, or a plain folder of classes.

A split folder has the sub-folders `train`, `val` (or `valid`, `validation`) and perhaps `test`, each with one folder a
class. Classes are matched by name, never by position.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bnlab.data.duplicates import file_sha256
from bnlab.data.pixels import open_photo
from bnlab.data.scan import Found, Refusal, class_folders, examine, photos_below, scan
from bnlab.data.split import LIST_NAME, Photo, check_classes, read_list, side, split_folder
from bnlab.errors import DataError, printable
from bnlab.progress import Progress

_SIDE_OF_FOLDER = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """The photos of DATA, ready to train on."""

    classes: tuple[str, ...]
    """names of the classes of train, sorted: the position of a name is its index in the network"""
    photos: tuple[Photo, ...]
    refused: tuple[Refusal, ...] = ()

    def side(self, split: str) -> list[Photo]:
        """The photos of train, val or test."""
        return [photo for photo in self.photos if photo.split == split]


def open_training_data(data: Path, *, val: float, seed: int, progress: Progress) -> Source:
    """The photos of DATA with their sides; a plain folder is split on the fly, as `bnlab split` would.

    Photos are read once to see that they can be used, except those a split.csv already vouches for.

    Raises:
        DataError: DATA is nothing to train on; the message says why.
    """
    refused: list[Refusal] = []
    if data.is_file():
        photos = read_list(data)
    elif sides := split_sides(data):
        photos, refused = _read_sides(data, sides, progress)
    else:
        split = split_folder(data, val=val, test=0.0, seed=seed, progress=progress)
        photos, refused = split.photos, split.refused
        _tell_conflicts(len(split.conflicts), data, progress)
    if not any(photo.split == "val" for photo in photos):
        photos = [_held_out(photo, val=val, seed=seed) for photo in photos]
        progress.note(f"{printable(data)} has no val side: {val:.0%} of train is held out")
    return _checked(data, photos, refused)


def open_recorded_data(path: Path) -> Source:
    """The photos of a run's own split.csv, which was checked when the run began.

    Raises:
        DataError: the list cannot be read, or a photo is no longer there.
    """
    photos = read_list(path)
    for photo in photos:
        if not Path(photo.path).is_file():
            raise DataError(f"{printable(photo.path)} is gone, and the run was trained on it", "put it back to resume")
    return _checked(path, photos, [])


def open_evaluation_data(data: Path, split: str | None) -> tuple[str, list[Photo]]:
    """The photos to evaluate on and the name of the side read: `split`, or the first of test, val and all there is.

    A plain folder of classes has one side, "all".

    Raises:
        DataError: DATA is nothing to evaluate on, or has no such side.
    """
    if data.is_file():
        photos = read_list(data)
    elif sides := split_sides(data):
        photos = [photo for side_name, folder in sides for photo in _listed(folder, side_name)]
    else:
        photos = [Photo(found.path, found.label, "all", "") for found in scan(data)]
    there = {photo.split for photo in photos}
    if split == "all":
        return "all", photos
    chosen = split or next(name for name in ("test", "val", "train", "all") if name in there)
    if chosen not in there:
        raise DataError(
            f"{printable(data)} has no {printable(chosen)} side", f"say --split {' or '.join(sorted(there | {'all'}))}"
        )
    return chosen, [photo for photo in photos if photo.split == chosen]


def split_sides(folder: Path) -> list[tuple[str, Path]]:
    """The train, val and test folders of a split folder; empty for a plain folder of classes.

    A class may be called `train` (beside `car` and `bus`): a side is known by the classes below it.
    """
    folders = class_folders(folder)
    sides = [(_SIDE_OF_FOLDER[name.lower()], path) for name, path in folders.items() if name.lower() in _SIDE_OF_FOLDER]
    if not any(name == "train" and class_folders(path) for name, path in sides):
        return []
    names = [name for name, _ in sides]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{printable(folder)} has two {name} folders", "keep one of val, valid and validation")
    return sides


def _listed(folder: Path, split: str) -> list[Photo]:
    return [
        Photo(photo, label, split, "") for label, path in class_folders(folder).items() for photo in photos_below(path)
    ]


def _read_sides(data: Path, sides: Iterable[tuple[str, Path]], progress: Progress) -> tuple[list[Photo], list[Refusal]]:
    listed = [photo for side_name, folder in sides for photo in _listed(folder, side_name)]
    train = next(folder for name, folder in sides if name == "train")
    for label, path in class_folders(train).items():
        if not any(photo.label == label and photo.split == "train" for photo in listed):
            raise DataError(
                f"class '{printable(label)}' has no photos in {printable(path)}", "add some or remove the folder"
            )
    known = {photo.path: photo.sha256 for photo in read_list(data / LIST_NAME)} if (data / LIST_NAME).is_file() else {}
    unknown = [Found(photo.path, photo.label) for photo in listed if photo.path not in known]
    refused: list[Refusal] = []
    if unknown:
        examined, refused = examine(
            unknown, _usable_sha256, title="reading photos", total=len(unknown), progress=progress
        )
        known |= {found.path: sha256 for found, sha256 in examined}
    photos = [Photo(p.path, p.label, p.split, known[p.path]) for p in listed if p.path in known]
    return photos, refused


def _usable_sha256(path: str) -> str:
    open_photo(path)
    return file_sha256(path)


def _held_out(photo: Photo, *, val: float, seed: int) -> Photo:
    key = photo.sha256 or file_sha256(photo.path)
    if photo.split != "train":
        return photo
    return Photo(photo.path, photo.label, side(key, val=val, test=0.0, seed=seed), key)


def _tell_conflicts(number: int, data: Path, progress: Progress) -> None:
    if number:
        progress.warn(
            f"{number} photo{'s stand' if number > 1 else ' stands'} in two classes at once: "
            f"`bnlab split {printable(data)} --list --into FOLDER` names them"
        )


def _checked(data: Path, photos: list[Photo], refused: list[Refusal]) -> Source:
    name = printable(data)
    classes = sorted({photo.label for photo in photos if photo.split == "train"})
    check_classes(classes, f"train of {name}" if classes else name)
    for split in ("val", "test"):
        unknown = sorted({photo.label for photo in photos if photo.split == split} - set(classes))
        if unknown:
            raise DataError(
                f"{split} of {name} has the class '{printable(unknown[0])}', which train has not",
                f"add photos of it to train or take it out of {split}",
            )
    source = Source(classes=tuple(classes), photos=tuple(photos), refused=tuple(refused))
    if not source.side("val"):
        raise DataError(f"{name} has no photo left for val", "add photos or hold out more")
    return source
