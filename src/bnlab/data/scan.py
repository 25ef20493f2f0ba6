"""Find the photos in a folder of classes, and report what is ignored or cannot be used."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from bnlab.data.photos import Photo
from bnlab.data.split_csv import as_label
from bnlab.errors import DataError, PhotoError, plural, printable
from bnlab.machine import usable_cores
from bnlab.progress import Progress

# Files with these suffixes are taken for photos. HEIC is not supported, and listed so that each such file is reported.
SUFFIXES = frozenset(
    f".{kind}"
    for kind in "jpg jpeg jpe jfif png gif bmp webp tif tiff avif heic heif jp2 ppm pgm pbm pnm".split()  # noqa: SIM905
)
_SPLIT_OF_FOLDER = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Refusal:
    """A photo that cannot be used, and why."""

    path: str
    reason: str
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Base of the results of commands: what went wrong without an error."""

    warnings: tuple[str, ...] = ()
    """all that was warned of, in order; the logger `bnlab` has it too"""
    refused: tuple[Refusal, ...] = ()
    """the photos that could not be used, and were left out"""


def scan(folder: Path) -> list[Photo]:
    """The photo files of a folder of classes, ordered by class and path.

    Each sub-folder is a class with all photos below it. Hidden files and folders are ignored. Symbolic links are
    followed, each folder once.

    Raises:
        DataError: the folder is missing or has no classes, or a class has no photos.
    """
    classes = class_folders(folder)
    if not classes:
        has_photos = next(photos_below(folder), None) is not None
        what = "photos but no sub-folders" if has_photos else "neither sub-folders nor photos"
        raise DataError(
            f"{printable(folder)} has {what}", "move the photos of each class into a sub-folder of its name"
        )
    files = []
    for label, path in classes.items():
        of_class = [Photo(photo, as_label(label)) for photo in photos_below(path)]
        if not of_class:
            raise empty_class_error(label, path)
        files += of_class
    return files


def empty_class_error(label: str, folder: Path) -> DataError:
    return DataError(
        f"class '{printable(label)}' has no photos in {printable(folder)}", "add some or remove the folder"
    )


def class_folders(folder: Path) -> dict[str, Path]:
    """The sub-folders of a folder by name, sorted, without hidden ones.

    Raises:
        DataError: the folder is missing or not readable.
    """
    try:
        return {p.name: p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")}
    except FileNotFoundError:
        raise DataError(f"there is no folder {printable(folder)}", "check the path") from None
    except OSError as error:
        raise DataError(f"{printable(folder)} cannot be read ({error.strerror})", "use a folder of photos") from None


def split_folders(folder: Path) -> list[tuple[str, Path]]:
    """The split and path of each train, val and test folder in a split folder; empty for a plain folder of classes.

    A class may be called `train`, too. So the folder counts as split only if `train` has sub-folders, and if another
    split's folder is next to it or no other folder at all.

    Raises:
        DataError: the folder is missing, or has two folders for one split.
    """
    folders = class_folders(folder)
    found = [
        (_SPLIT_OF_FOLDER[name.lower()], path) for name, path in folders.items() if name.lower() in _SPLIT_OF_FOLDER
    ]
    has_train = any(split == "train" and class_folders(path) for split, path in found)
    if not has_train or (len(found) == 1 and len(folders) > 1):
        return []
    for split, number in Counter(split for split, _ in found).items():
        if number > 1:
            raise DataError(f"{printable(folder)} has two {split} folders", "keep one of val, valid and validation")
    return found


def photos_below(folder: Path) -> Iterator[str]:
    """Paths of the photos at any depth below a folder, sorted, without hidden ones."""
    return (path for path in _files_below(folder) if is_photo(path))


def is_photo(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122 (a Path for each of a million files is slow)


def _files_below(folder: Path) -> Iterator[str]:
    seen: set[str] = set()  # a link to a parent folder would never end
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


def map_photos(
    photos: Sequence[Photo], read: Callable[[str], T], refused: list[Refusal], progress: Progress
) -> Iterator[tuple[int, T]]:
    """Call `read` with the path of each photo, on all cores.

    Yields the position and the result of each photo, in order. Photos at which `read` raises a PhotoError are added to
    `refused` instead.
    """

    def attempt(photo: Photo) -> T | Refusal:
        try:
            return read(photo.path)
        except PhotoError as error:
            return Refusal(photo.path, error.reason, photo.label)

    with ThreadPoolExecutor(usable_cores()) as pool, progress.task("reading photos", len(photos), "photos") as task:
        for start in range(0, len(photos), 256):
            for i, result in enumerate(pool.map(attempt, photos[start : start + 256]), start):
                if isinstance(result, Refusal):
                    refused.append(result)
                else:
                    yield i, result
                task.advance()


def report_refused(refused: Sequence[Refusal], *, strict: bool, progress: Progress) -> None:
    """Warn of the photos that cannot be used, the first five by name.

    Raises:
        DataError: `strict` is set and there is such a photo.
    """
    if refused and strict:
        first = f"{printable(refused[0].path)}, {refused[0].reason}"
        raise DataError(
            f"{plural(len(refused), 'photo')} cannot be used (the first: {first})", "fix them or leave out --strict"
        )
    for refusal in refused[:5]:
        progress.warn(f"left out {printable(refusal.path)}: {refusal.reason}")
    if len(refused) > 5:
        progress.warn(f"and {len(refused) - 5} more photos that cannot be used")


def report_ignored_files(folder: Path, progress: Progress) -> None:
    """Warn of photos that belong to no class and of nested folders, and note files that are not photos."""
    loose = sum(is_photo(path.name) for path in folder.iterdir() if path.is_file())
    if loose:
        progress.warn(f"left out {plural(loose, 'photo')} in {printable(folder)} that belong to none of its classes")
    others: Counter[str] = Counter()
    for label, path in class_folders(folder).items():
        nested = [printable(name) for name, sub in class_folders(path).items() if next(photos_below(sub), None)]
        if nested:
            progress.warn(
                f"class '{printable(label)}' has sub-folders ({', '.join(nested[:5])}): their photos belong to it, too"
            )
        others.update(Path(name).suffix.lower() or "no suffix" for name in _files_below(path) if not is_photo(name))
    if others:
        kinds = ", ".join(f"{number} with {printable(kind)}" for kind, number in others.most_common(5))
        progress.note(f"left out {plural(others.total(), 'other file')}: {kinds}")
