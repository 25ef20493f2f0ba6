"""Finds photos: which files of a folder are photos, of which class, and which cannot be used."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from bnlab.data.split_csv import as_label
from bnlab.errors import DataError, PhotoError, plural, printable
from bnlab.machine import usable_cores
from bnlab.progress import Progress

# What is taken for a photo; .heic is named among the refused rather than passed over in silence.
SUFFIXES = frozenset(
    f".{kind}"
    for kind in "jpg jpeg jpe jfif png gif bmp webp tif tiff avif heic heif jp2 ppm pgm pbm pnm".split()  # noqa: SIM905
)


_SPLIT_OF_FOLDER = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PhotoFile:
    """A file that looks like a photo: where it is, and the class its folder names."""

    path: str
    label: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """A photo that cannot be used, and why."""

    path: str
    reason: str
    label: str = ""


def scan(folder: Path) -> list[PhotoFile]:
    """The photos of a folder of classes, by class and path.

    Each sub-folder is a class, with all that lies below it; hidden ones are none. Links are followed, once.

    Raises:
        DataError: there is no such folder, it has no classes, or a class has no photos.
    """
    classes = class_folders(folder)
    if not classes:
        loose = next(photos_below(folder), None)
        what = "photos but no sub-folders" if loose else "neither sub-folders nor photos"
        raise DataError(f"{printable(folder)} has {what}", "put the photos of each class into a sub-folder of its name")
    found = []
    for label, path in classes.items():
        photos = [PhotoFile(photo, as_label(label)) for photo in photos_below(path)]
        if not photos:
            raise DataError(
                f"class '{printable(label)}' has no photos in {printable(path)}", "add some or remove the folder"
            )
        found += photos
    return found


def class_folders(folder: Path) -> dict[str, Path]:
    """The sub-folders of a folder by name, sorted, hidden ones left out.

    Raises:
        DataError: there is no such folder, or it may not be read.
    """
    try:
        return {p.name: p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")}
    except FileNotFoundError:
        raise DataError(f"there is no folder {printable(folder)}", "check the path") from None
    except OSError as error:
        raise DataError(f"{printable(folder)} cannot be read ({error.strerror})", "give a folder of photos") from None


def split_folders(folder: Path) -> list[tuple[str, Path]]:
    """The train, val and test folders of a split folder; empty for a plain folder of classes.

    A class may be called `train`: a side is known by the classes below it, and by another side beside it.

    Raises:
        DataError: there is no such folder, or two of its folders are the same side.
    """
    folders = class_folders(folder)
    sides = [
        (_SPLIT_OF_FOLDER[name.lower()], path) for name, path in folders.items() if name.lower() in _SPLIT_OF_FOLDER
    ]
    if not any(name == "train" and class_folders(path) for name, path in sides):
        return []
    if len(sides) == 1 and len(folders) > 1:
        return []
    names = [name for name, _ in sides]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{printable(folder)} has two {name} folders", "keep one of val, valid and validation")
    return sides


def photos_below(folder: Path) -> Iterator[str]:
    """Paths of the photos anywhere below a folder, sorted, hidden ones left out."""
    return (path for path in _files_below(folder) if is_photo(path))


def is_photo(name: str) -> bool:
    """Whether a file is taken for a photo: by its suffix."""
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122 (a Path for each of a million files is slow)


def _files_below(folder: Path) -> Iterator[str]:
    seen: set[str] = set()  # a link that leads back up would never end
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield os.path.join(where, name)  # noqa: PTH118


def map_usable_photos(
    found: Iterable[PhotoFile], look: Callable[[str], T], *, title: str, total: int, progress: Progress
) -> tuple[list[tuple[PhotoFile, T]], list[Refusal]]:
    """`look` at every photo with all cores; those at which it raises PhotoError are refused. Order is kept."""
    good: list[tuple[PhotoFile, T]] = []
    refused: list[Refusal] = []
    for one, result in map_photos(found, look, title=title, total=total, progress=progress):
        if isinstance(result, PhotoError):
            refused.append(Refusal(one.path, result.reason, one.label))
        else:
            good.append((one, result))
    return good, refused


def map_photos(
    found: Iterable[PhotoFile], look: Callable[[str], T], *, title: str, total: int, progress: Progress
) -> Iterator[tuple[PhotoFile, T | PhotoError]]:
    """`map_usable_photos` as a stream: each photo with what `look` gave or the PhotoError that it raised."""
    with ThreadPoolExecutor(usable_cores()) as pool, progress.task(title, total, "photos") as task:

        def attempt(one: PhotoFile) -> T | PhotoError:
            try:
                return look(one.path)
            except PhotoError as error:
                return error

        photos = iter(found)
        while some := list(islice(photos, 256)):
            for one, result in zip(some, pool.map(attempt, some), strict=True):
                yield one, result
                task.advance()


def report_refused(refused: Iterable[Refusal], *, strict: bool, progress: Progress, shown: int = 5) -> None:
    """Name the photos that cannot be used, the first few by name.

    Raises:
        DataError: `strict`, and there is one.
    """
    refused = list(refused)
    if refused and strict:
        first = f"{printable(refused[0].path)}, {refused[0].reason}"
        raise DataError(
            f"{plural(len(refused), 'photo')} cannot be used (the first: {first})",
            "mend them or leave --strict out",
        )
    for refusal in refused[:shown]:
        progress.warn(f"left out {printable(refusal.path)}: {refusal.reason}")
    if len(refused) > shown:
        progress.warn(f"and {len(refused) - shown} more photos that cannot be used")


def report_ignored_files(folder: Path, progress: Progress) -> None:
    """Say what a folder of classes holds beside its classes' photos, so that nothing is passed over in silence."""
    loose = sum(is_photo(path.name) for path in folder.iterdir() if path.is_file())
    if loose:
        progress.warn(f"left out {plural(loose, 'photo')} beside the classes in {printable(folder)}, in none of them")
    others: Counter[str] = Counter()
    for label, path in class_folders(folder).items():
        below = [printable(name) for name, sub in class_folders(path).items() if next(photos_below(sub), None)]
        if below:
            progress.warn(
                f"class '{printable(label)}' has sub-folders ({', '.join(below[:5])}): all below it is one class"
            )
        others.update(Path(name).suffix.lower() or "no suffix" for name in _files_below(path) if not is_photo(name))
    if others:
        kinds = ", ".join(f"{number} with {printable(kind)}" for kind, number in others.most_common(5))
        progress.note(f"left out {plural(others.total(), 'other file')}: {kinds}")
