"""Write a split to a folder: as hard links, as copies, or as split.csv alone."""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

from bnlab.data.photos import Photo
from bnlab.data.split import Split
from bnlab.data.split_csv import SPLIT_CSV, read_split_csv, write_split_csv
from bnlab.errors import DataError, printable
from bnlab.files import new_folder, storage_errors, write_csv
from bnlab.progress import Progress

LinkMode = Literal["link", "copy", "list"]


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


def _check_target(photos: Path, into: Path) -> None:
    source, target = photos.resolve(), into.resolve()
    if target == source or source in target.parents:
        raise DataError(
            f"{printable(into)} lies within {printable(photos)}, which is never written to",
            "use another folder for --into",
        )
    if target in source.parents and target.is_dir() and any(target.iterdir()):
        raise DataError(f"{printable(into)} contains {printable(photos)} itself", "use a new folder for --into")
    if into.exists() and not into.is_dir():
        raise DataError(f"{printable(into)} is a file", "use a new folder for --into")


def _row(split: Split, photo: Photo, mode: LinkMode) -> Photo:
    """The photo as split.csv lists it: with an absolute path for "list", else with its path in the new folder."""
    if mode == "list":
        return replace(photo, path=os.path.abspath(photo.path))  # noqa: PTH100 (symbolic links are kept)
    relative = Path(os.path.relpath(photo.path, split.folder)).as_posix()
    return replace(photo, path=f"{photo.split}/{relative}")


def _check_same(split: Split, rows: list[Photo], into: Path, mode: LinkMode) -> None:
    """Refuse a folder that holds anything but this split in this mode."""
    name, remedy = printable(into), "use a new folder for --into, or remove this one"
    if not (into / SPLIT_CSV).is_file():
        raise DataError(f"{name} exists and is not a split that bnlab wrote", remedy)
    if list(read_split_csv(into / SPLIT_CSV)) != [replace(row, path=str(into / row.path)) for row in rows]:
        raise DataError(f"{name} holds another split (other photos, --val, --test, --seed or --list)", remedy)
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
