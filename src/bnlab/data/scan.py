"""Find the photos in a folder of classes, and report what is ignored or cannot be used."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
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
    for kind in "jpg jpeg jpe jfif mpo png gif bmp webp tif tiff avif heic heif jp2 ppm pgm pbm pnm".split()  # noqa: SIM905
)
_SPLIT_OF_FOLDER = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# Folders that operating systems and network drives add. Some hold small copies of the photos next to them.
_SYSTEM_FOLDERS = frozenset(
    name.casefold()
    for name in (
        *("__MACOSX", "@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information", "lost+found"),
        "__pycache__",
    )
)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Refusal:
    """A photo that cannot be used, or a folder that cannot be read, and why."""

    path: str
    reason: str
    label: str = ""
    is_folder: bool = False


@dataclass(frozen=True, kw_only=True)
class Result:
    """Base of the results of commands: what went wrong without an error."""

    warnings: tuple[str, ...] = ()
    """all that was warned of, in order; the logger `bnlab` has it too"""
    refused: tuple[Refusal, ...] = ()
    """the photos that could not be used, and were left out"""

    def _line(self, *facts: str) -> str:
        """A repr of one line, since fields hold thousands of photos: these facts, and how much was left out."""
        left_out = [f"{refused_number(self.refused)} left out"] if self.refused else []
        warned = [plural(len(self.warnings), "warning")] if self.warnings else []
        return f"<{type(self).__name__} {printable(', '.join([*facts, *left_out, *warned]))}>"


@dataclass(frozen=True, slots=True)
class _Listing:
    """What a folder holds, by name, sorted, without what is hidden."""

    folders: list[str]
    files: list[str]
    system: list[str]  # folders that hold no photos of the user's
    broken: list[Refusal]  # symbolic links that lead nowhere, which may have been folders


def scan(folder: Path, refused: list[Refusal]) -> list[Photo]:
    """The photo files of a folder of classes, ordered by class and path.

    Each sub-folder with photos at any depth is a class. Hidden files and folders are ignored, and so are those of the
    system, such as `__MACOSX`. Symbolic links are followed, each folder once. Folders that cannot be read are added to
    `refused`.

    Raises:
        DataError: the folder is missing, or no sub-folder has photos.
    """
    classes = class_folders(folder, refused)
    files = [
        Photo(photo, as_label(label)) for label, path in classes.items() for photo in photos_below(path, refused, label)
    ]
    if not files and not (left_out := _left_out(folder)):
        has_photos = any(map(is_photo, _list(folder).files))
        what = "photos but no sub-folders" if has_photos else "neither sub-folders nor photos"
        raise DataError(
            f"{printable(folder)} has {what}", "move the photos of each class into a sub-folder of its name"
        )
    if not files:
        raise DataError(f"{printable(folder)} has no class with photos{left_out}", "add photos to its sub-folders")
    return files


def check_classes(labels: Sequence[str], where: str, folder: Path) -> None:
    """Refuse fewer than two classes. The error names the sub-folders of `folder` that were left out.

    Raises:
        DataError: there is no class, or only one.
    """
    if len(labels) < 2:
        only = f"only one class, '{printable(labels[0])}'" if labels else "no classes"
        raise DataError(
            f"{where} has {only}{_left_out(folder)}", "a classifier needs two or more: add another sub-folder"
        )


def class_folders(folder: Path, refused: list[Refusal] | None = None, *, with_system: bool = False) -> dict[str, Path]:
    """The sub-folders of a folder by name, sorted, without hidden ones and those of the system.

    Links that lead nowhere are added to `refused`.

    Raises:
        DataError: the folder is missing or not readable.
    """
    try:
        listing = _list(folder)
    except FileNotFoundError:
        raise DataError(f"there is no folder {printable(folder)}", "check the path") from None
    except OSError as error:
        raise DataError(f"{printable(folder)} cannot be read ({error.strerror})", "use a folder of photos") from None
    if refused is not None:
        refused += listing.broken
    return {name: folder / name for name in [*listing.folders, *(listing.system if with_system else ())]}


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


def photos_below(folder: Path, refused: list[Refusal], label: str = "") -> Iterator[str]:
    """Paths of the photos at any depth below a folder, sorted, without hidden ones.

    Folders that cannot be read are added to `refused`, with `label`.
    """
    for where, listing in _walk(folder, refused, label):
        for name in listing.files:
            if is_photo(name):
                yield os.path.join(where, name)  # noqa: PTH118


def is_photo(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122 (a Path for each of a million files is slow)


def _walk(folder: Path, refused: list[Refusal], label: str = "") -> Iterator[tuple[str, _Listing]]:
    """Each folder that can be read, from `folder` down, with what it holds."""
    seen: set[str] = set()  # a link to a parent folder would never end
    pending = [str(folder)]
    while pending:
        where = pending.pop()
        real = os.path.realpath(where)
        if real in seen:
            continue
        seen.add(real)
        try:
            listing = _list(where)
        except OSError as error:
            refused.append(Refusal(where, _unreadable(error), label, is_folder=True))
            continue
        refused += [replace(link, label=label) for link in listing.broken]
        yield where, listing
        pending += [os.path.join(where, name) for name in reversed(listing.folders)]  # noqa: PTH118


def _list(folder: str | Path) -> _Listing:
    """What a folder holds. A link that leads nowhere counts as a file if it has a photo's name.

    Raises:
        OSError: the folder cannot be read.
    """
    listing = _Listing([], [], [], [])
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        try:
            is_folder = entry.is_dir()
            if not is_folder and entry.is_symlink() and not is_photo(entry.name):
                entry.stat()
        except OSError as error:
            if is_photo(entry.name):  # whoever reads it says why it cannot be used
                listing.files.append(entry.name)
            else:
                listing.broken.append(Refusal(entry.path, _unreadable(error), is_folder=True))
            continue
        is_system = is_folder and entry.name.casefold() in _SYSTEM_FOLDERS
        (listing.system if is_system else listing.folders if is_folder else listing.files).append(entry.name)
    return listing


def _unreadable(error: OSError) -> str:
    return f"it cannot be read ({error.strerror or error})"


def _left_out(folder: Path) -> str:
    """The sub-folders of a folder of classes, or of its train, that give no class, as a part of an error."""
    with suppress(DataError, OSError):
        folder = dict(split_folders(folder)).get("train", folder)
        listing = _list(folder)
        reasons = [*((name, "a folder of the system") for name in listing.system)]
        reasons += [(os.path.basename(link.path), link.reason) for link in listing.broken]  # noqa: PTH119
        for name in listing.folders:
            refused: list[Refusal] = []
            if next(photos_below(folder / name, refused), None) is None:
                reasons.append((name, refused[0].reason if refused else "no photos"))
        if reasons:
            more = f" and {len(reasons) - 5} more" if len(reasons) > 5 else ""
            return f"; left out: {', '.join(f'{printable(name)} ({why})' for name, why in reasons[:5])}{more}"
    return ""


def map_photos(
    photos: Sequence[Photo], read: Callable[[Photo], T], refused: list[Refusal], progress: Progress
) -> Iterator[tuple[int, T]]:
    """Call `read` with each photo, on all cores.

    Yields the position and the result of each photo, in order. Photos at which `read` raises a PhotoError are added to
    `refused` instead.
    """

    def attempt(photo: Photo) -> T | Refusal:
        try:
            return read(photo)
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
    """Warn of the photos that cannot be used and the folders that cannot be read, the first five by name.

    Raises:
        DataError: `strict` is set and there is such a photo or folder.
    """
    if refused and strict:
        first = f"{printable(refused[0].path)}, {refused[0].reason}"
        raise DataError(
            f"{refused_number(refused)} cannot be used (the first: {first})", "fix them or leave strict out"
        )
    for refusal in refused[:5]:
        progress.warn(f"left out {printable(refusal.path)}: {refusal.reason}")
    if len(refused) > 5:
        progress.warn(f"and {refused_number(refused[5:], 'more ')} that cannot be used")


def refused_number(refused: Sequence[Refusal], more: str = "") -> str:
    """How many photos and folders these are, such as "2 photos and 1 folder"."""
    folders = sum(refusal.is_folder for refusal in refused)
    counts = {f"{more}photo": len(refused) - folders, f"{more}folder": folders}
    return " and ".join(plural(number, what) for what, number in counts.items() if number)


def report_ignored_files(folder: Path, progress: Progress) -> None:
    """Warn of photos that belong to no class, of nested folders and of folders that are left out; note other files.

    Folders that cannot be read are not named: `photos_below` lists them.
    """
    listing = _list(folder)
    loose = sum(map(is_photo, listing.files))
    if loose:
        progress.warn(f"left out {plural(loose, 'photo')} of {printable(folder)} outside of its classes")
    others: Counter[str] = Counter()
    empty, system = list[str](), [str(folder / name) for name in listing.system]
    for label in listing.folders:
        photos, nested = 0, dict[str, None]()
        for where, below in _walk(folder / label, []):
            system += [os.path.join(where, name) for name in below.system]  # noqa: PTH118
            others.update(Path(name).suffix.lower() or "no suffix" for name in below.files if not is_photo(name))
            if here := sum(map(is_photo, below.files)):
                photos += here
                nested |= dict.fromkeys(Path(where).relative_to(folder / label).parts[:1])
        if nested:
            names = ", ".join(map(printable, list(nested)[:5]))
            progress.warn(f"class '{printable(label)}' has sub-folders ({names}): their photos belong to it, too")
        if not photos:
            empty.append(str(folder / label))
    _warn_left_out("without photos", empty, progress)
    _warn_left_out("of the system", system, progress)
    if others:
        kinds = ", ".join(f"{number} with {printable(kind)}" for kind, number in others.most_common(5))
        progress.note(f"left out {plural(others.total(), 'other file')}: {kinds}")


def report_system_folders(folder: Path, progress: Progress) -> None:
    """Warn of the folders of the system below a folder, whose photos are left out."""
    system = [os.path.join(where, name) for where, below in _walk(folder, []) for name in below.system]  # noqa: PTH118
    _warn_left_out("of the system", system, progress)


def _warn_left_out(what: str, folders: Sequence[str], progress: Progress) -> None:
    if folders:
        more = f" and {len(folders) - 5} more" if len(folders) > 5 else ""
        names = ", ".join(map(printable, folders[:5]))
        progress.warn(f"left out {plural(len(folders), 'folder')} {what}: {names}{more}")
