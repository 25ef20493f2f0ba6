"""Open DATA, which is a split folder, a split.csv, a run folder or a plain folder of classes.

A split folder has the sub-folders `train`, `val` (or `valid`, `validation`) and optionally `test`, each with one folder
for each class. Classes are matched by name, never by position.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np

from bnlab.data.deep_pixels import PixelRangeError
from bnlab.data.location import Place, places, root_of, where_they_are
from bnlab.data.photo_file import PhotoReader
from bnlab.data.photos import Content, Photo, Photos
from bnlab.data.scan import (
    Refusal,
    check_classes,
    class_folders,
    photos_below,
    report_ignored_files,
    scan,
    split_folders,
)
from bnlab.data.split import split_files, split_folder
from bnlab.data.split_csv import SPLIT_CSV, SPLITS, as_label, read_split_csv
from bnlab.data.verify import first_of, read_content, with_present_content
from bnlab.errors import DataError, PhotoError, plural, printable, quoted
from bnlab.progress import NullProgress, Progress

_LOOKED_AT = 32  # photos of a list that is known to be usable


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The photos to train on, with their labels and splits."""

    classes: tuple[str, ...]  # class names of train, sorted: the position of a name is its index in the network
    photos: Photos
    refused: tuple[Refusal, ...] = ()
    own_val: bool = True  # whether DATA has val photos; else a fraction of train was held out
    reader: PhotoReader = field(default_factory=PhotoReader)  # opened the photos, and gathered what to report of them
    place: Place  # the folder below which all photos lie

    def in_split(self, *splits: str) -> Photos:
        return self.photos.in_split(*splits)


def open_training_data(
    data: Path, *, val: float, seed: int, progress: Progress, reader: PhotoReader | None = None
) -> Dataset:
    """The photos of DATA with their splits.

    A plain folder of classes is split as `bnlab split` would; so is train, if there is no val. Each photo is read once
    to check that it can be used, unless a split.csv lists its SHA-256 and its file has not changed since.
    `reader` (default: one with the default settings) opens them.

    Raises:
        DataError: DATA cannot be trained on.
    """
    reader = reader or PhotoReader()
    if split_csv := _split_csv_of(data):
        photos, refused = _usable_photos(data, _listed(split_csv), progress, reader)
    elif folders := split_folders(data):
        unreadable: list[Refusal] = []
        listed = _read_split_folder(data, folders, unreadable, progress)
        photos, refused = _usable_photos(data, listed, progress, reader)
        refused = [*unreadable, *refused]
    else:
        split = split_folder(data, val=val, test=0.0, seed=seed, progress=progress, reader=reader)
        if split.conflicts:
            progress.warn(
                f"{plural(len(split.conflicts), 'group')} of duplicates in more than one class: "
                f"`bnlab split {quoted(data)} --list --into FOLDER` names them"
            )
        return _make_dataset(data, split.photos, split.refused, own_val=False, reader=reader)
    own_val = "val" in photos.splits
    if not own_val:
        progress.note(f"{printable(data)} has no val split: {val:.0%} of train is held out")
        train = photos.in_split("train")
        split = split_files(data, train, val=val, test=0.0, seed=seed, progress=progress, reader=reader)
        photos = Photos.of(chain(split.photos, photos.in_split("val", "test")))
        refused += split.refused
    if shared := photos.in_split("val", "test").count_shared(photos.in_split("train")):
        progress.warn(
            f"{plural(shared, 'photo')} of val and test also in train, identical to the byte: accuracy may be too high"
        )
    return _make_dataset(data, photos, refused, own_val=own_val, reader=reader)


def open_recorded_data(
    path: Path,
    *,
    data: Path | None = None,
    splits: Sequence[str] = SPLITS,
    remedy: str = "restore them, or begin again",
    progress: Progress | None = None,
) -> Dataset:
    """The photos of a split.csv that bnlab wrote when a training or a study began.

    They are looked for where the list says, then at the same place relative to its folder; or in DATA, if it is given.
    The content of those in `splits` is verified.

    Raises:
        DataError: the list cannot be read, or photos are missing or have changed. It names the first of them.
    """
    listed = read_split_csv(path)
    known = list(places(path, listed))
    if data is not None:
        known = [Place(known[0].listed, _folder_of(data))]
    faults: list[tuple[tuple[int, int], str]] = []
    for place in known:
        photos = place.of(listed)
        numbers, fault = _difference(photos.in_split(*splits), progress or NullProgress())
        if not any(numbers):
            return _make_dataset(path, photos, [], place=place)
        faults.append((numbers, f"in {printable(place.now)} {fault}"))
    # Where a project was moved from, all photos are missing. That is no news, so only the other place is named.
    fewest = min(numbers for numbers, _ in faults)
    named = ", and ".join(fault for numbers, fault in faults if numbers == fewest)
    raise DataError(f"the photos are not those of {printable(path)}: {named}", remedy)


def _difference(photos: Photos, progress: Progress) -> tuple[tuple[int, int], str]:
    """How many photos cannot be read, how many have other content than is recorded of them, and a text that says so."""
    refused: list[Refusal] = []
    now = with_present_content(photos, lambda photo: read_content(photo.path), refused, progress)
    changed = photos[now.hashed & photos.hashed & ~now.same_content(photos)].paths
    faults = []
    if refused:
        names = first_of([refusal.path for refusal in refused])
        faults.append(f"{plural(len(refused), 'photo')} cannot be read ({names}; the first: {refused[0].reason})")
    if changed:
        have = "has" if len(changed) == 1 else "have"
        faults.append(f"{plural(len(changed), 'photo')} {have} other content ({first_of(changed)})")
    return (len(refused), len(changed)), " and ".join(faults)


def _folder_of(data: Path) -> str:
    """The folder below which the photos of DATA lie."""
    if not data.exists():
        raise DataError(f"there is no folder {printable(data)}", "check the path")
    split_csv = _split_csv_of(data)
    return root_of(_listed(split_csv), data) if split_csv else os.path.abspath(data)  # noqa: PTH100


def open_evaluation_data(
    data: Path, split: str | None, refused: list[Refusal] | None = None, progress: Progress | None = None
) -> tuple[str, Photos]:
    """The photos to evaluate on and the name of their split.

    That is `split`, or the first of test, val and train that DATA has. "all" selects all photos, and is the only split
    of a plain folder of classes. Folders that cannot be read are added to `refused`. With a progress,
    photos that have changed since they were listed are reported.

    Raises:
        DataError: DATA cannot be evaluated on, or has no such split.
    """
    refused, verify = [] if refused is None else refused, progress is not None
    progress = progress or NullProgress()
    folders: Sequence[tuple[str, Path]] = ()
    unreadable: list[Refusal] = []  # in any split
    if split_csv := _split_csv_of(data):
        photos = _listed(split_csv)
    elif folders := split_folders(data):
        photos = Photos.of(_photos_in(folders, unreadable))
    else:
        photos = Photos.of(replace(photo, split="all") for photo in scan(data, refused))
        report_ignored_files(data, progress)
    if not photos:
        raise DataError(f"{printable(data)} has no photos", "use a split folder, a split.csv or a folder of classes")
    chosen = split or next(name for name in ("test", "val", "train", "all") if name in photos.splits)
    if folders:
        class_folders(data, refused)
    for name, folder in folders:
        if chosen in (name, "all"):
            refused += (each for each in unreadable if Path(each.path).is_relative_to(folder))
            report_ignored_files(folder, progress)
    if chosen not in photos.splits | {"all"}:
        known = " or ".join(sorted(photos.splits | {"all"}))
        raise DataError(f"{printable(data)} has no {printable(chosen)} split", f"use split {known}")
    if chosen != "all":
        photos = photos.in_split(chosen)
    if split_csv and verify:
        listed = photos[photos.hashed]
        now = with_present_content(listed, lambda photo: read_content(photo.path), [], progress)
        _report_changed(data, listed[now.hashed & ~now.same_content(listed)], progress)
    return chosen, photos


def _listed(split_csv: Path) -> Photos:
    """The photos of a split.csv, at the place where they are."""
    return where_they_are(split_csv, read_split_csv(split_csv))


def _report_changed(data: Path, changed: Photos, progress: Progress) -> None:
    if changed:
        progress.warn(
            f"{plural(len(changed), 'photo')} changed since the split.csv of {printable(data)} was written "
            f"({first_of(changed.paths)}): what is there now is used, with the class and split that are listed"
        )


def _split_csv_of(data: Path) -> Path | None:
    """The split.csv that DATA is, that of a run folder, or the only content of a folder."""
    if data.is_file():
        return data
    path = data / SPLIT_CSV
    is_run = (data / "recipe.yaml").is_file()
    return path if path.is_file() and (is_run or not class_folders(data)) else None


def _photos_in(folders: Iterable[tuple[str, Path]], refused: list[Refusal]) -> Iterator[Photo]:
    return (
        Photo(photo, as_label(label), split)
        for split, folder in folders
        for label, path in class_folders(folder, refused).items()
        for photo in photos_below(path, refused, label)
    )


def _report_ignored(data: Path, folders: Sequence[tuple[str, Path]], progress: Progress) -> None:
    """Warn of what is ignored in a split folder."""
    for _, folder in folders:
        report_ignored_files(folder, progress)
    if others := class_folders(data, with_system=True).keys() - {folder.name for _, folder in folders}:
        names = ", ".join(map(printable, sorted(others)[:5]))
        progress.warn(f"left out folders of {printable(data)} that are not train, val or test: {names}")


def _read_split_folder(
    data: Path, folders: Sequence[tuple[str, Path]], refused: list[Refusal], progress: Progress
) -> Photos:
    """The photos of a split folder, with the content that its split.csv lists. Warns of what is ignored."""
    class_folders(data, refused)
    photos = Photos.of(_photos_in(folders, refused))
    _report_ignored(data, folders, progress)
    return photos.with_content_of(read_split_csv(data / SPLIT_CSV)) if (data / SPLIT_CSV).is_file() else photos


def _usable_photos(data: Path, photos: Photos, progress: Progress, reader: PhotoReader) -> tuple[Photos, list[Refusal]]:
    """The photos that can be used, with their content. Those whose files are as listed are not read.

    But a few of the listed ones are looked at, to find out whether their values have a range.
    """

    def usable_content(photo: Photo) -> Content:
        content = read_content(photo.path)
        if content.sha256 != photo.sha256:  # else it could be opened when it was listed
            reader.open(photo.path)
        return content

    refused: list[Refusal] = []
    now = with_present_content(photos, usable_content, refused, progress)
    usable = now.hashed
    _report_changed(data, photos[usable & photos.hashed & ~now.same_content(photos)], progress)
    listed = np.flatnonzero(usable & photos.hashed)
    for i in listed[np.linspace(0, len(listed) - 1, min(len(listed), _LOOKED_AT), dtype=int)].tolist():
        try:
            reader.check_range(photos[i].path)
        except PixelRangeError:
            raise
        except PhotoError:  # it is reported when it is read
            pass
    return now[usable], refused


def _make_dataset(
    data: Path,
    photos: Iterable[Photo],
    refused: Iterable[Refusal],
    *,
    own_val: bool = True,
    place: Place | None = None,
    reader: PhotoReader | None = None,
) -> Dataset:
    """The dataset, if its classes and splits can be trained on."""
    photos = Photos.of(photos)
    name = printable(data)
    repeated = photos.first_repeated_path()
    if repeated is not None:
        raise DataError(f"{name} lists {printable(repeated)} more than once", "a photo has one class and one split")
    classes = photos.in_split("train").labels
    check_classes(classes, f"train of {name}" if classes else name, data)
    for split in ("val", "test"):
        if unknown := set(photos.in_split(split).labels) - set(classes):
            raise DataError(
                f"{split} of {name} has the class '{printable(min(unknown))}', which train does not have",
                f"add photos of it to train or remove it from {split}",
            )
    if not photos.in_split("val"):
        raise DataError(f"{name} has no photos left for val", "add photos or hold out more")
    if place is None:
        root = root_of(photos, data)
        place = Place(root, root)
    return Dataset(
        classes=tuple(classes),
        photos=photos,
        refused=tuple(refused),
        own_val=own_val,
        place=place,
        reader=reader or PhotoReader(),
    )
