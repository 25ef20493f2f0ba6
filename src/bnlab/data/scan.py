"""Finds photos: which files of a folder are photos, of which class, and which cannot be used."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from bnlab.errors import DataError, PhotoError, printable
from bnlab.machine import usable_cores
from bnlab.progress import Progress

# What is taken for a photo; .heic is named among the refused rather than passed over in silence.
SUFFIXES = frozenset(
    f".{kind}"
    for kind in "jpg jpeg jpe jfif png gif bmp webp tif tiff avif heic heif jp2 ppm pgm pbm pnm".split()  # noqa: SIM905
)


@dataclass(frozen=True, slots=True)
class Found:
    """A file that looks like a photo: where it is, and the class its folder names."""

    path: str
    label: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """A photo that cannot be used, and why."""

    path: str
    reason: str


def scan(folder: Path) -> list[Found]:
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
        photos = [Found(photo, label) for photo in photos_below(path)]
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


def photos_below(folder: Path) -> Iterator[str]:
    """Paths of the photos anywhere below a folder, sorted, hidden ones left out."""
    seen: set[str] = set()  # a link that leads back up would never end
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:  # noqa: PTH122 (a Path for each of a million files is slow)
                yield os.path.join(where, name)  # noqa: PTH118


T = TypeVar("T")


def examine(
    found: Iterable[Found], look: Callable[[str], T], *, title: str, total: int, progress: Progress
) -> tuple[list[tuple[Found, T]], list[Refusal]]:
    """`look` at every photo with all cores; those at which it raises PhotoError are refused. Order is kept."""
    good: list[tuple[Found, T]] = []
    refused: list[Refusal] = []
    with ThreadPoolExecutor(usable_cores()) as pool, progress.task(title, total, "photos") as task:

        def attempt(one: Found) -> T | PhotoError:
            try:
                return look(one.path)
            except PhotoError as error:
                return error

        photos = iter(found)
        while some := list(islice(photos, 256)):
            for one, result in zip(some, pool.map(attempt, some), strict=True):
                if isinstance(result, PhotoError):
                    refused.append(Refusal(one.path, result.reason))
                else:
                    good.append((one, result))
                task.advance()
    return good, refused


def tell_refused(refused: Iterable[Refusal], *, strict: bool, progress: Progress, shown: int = 5) -> None:
    """Name the photos that cannot be used, the first few by name.

    Raises:
        DataError: `strict`, and there is one.
    """
    refused = list(refused)
    if refused and strict:
        first = f"{printable(refused[0].path)}, {refused[0].reason}"
        raise DataError(
            f"{len(refused)} photo{'s' * (len(refused) != 1)} cannot be used (the first: {first})",
            "mend them or leave --strict out",
        )
    for refusal in refused[:shown]:
        progress.warn(f"left out {printable(refusal.path)}: {refusal.reason}")
    if len(refused) > shown:
        progress.warn(f"and {len(refused) - shown} more photos that cannot be used")
