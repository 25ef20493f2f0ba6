"""Lays a split out as a folder: links, copies, or the list alone."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from bnlab.data.photos import Photo
from bnlab.data.split import Split
from bnlab.data.split_csv import SPLIT_CSV, read_split_csv, write_rows
from bnlab.errors import DataError, printable
from bnlab.files import new_folder, storage_errors, write_csv
from bnlab.progress import Progress

LinkMode = Literal["link", "copy", "list"]


def write_split(split: Split, into: Path, how: LinkMode, progress: Progress) -> bool:
    """Lay the split out as a folder; False when it lies there already, just so.

    "link": `into/train/<class>/...` as hard links, copies where the file system has none, with `split.csv` and
    `findings.csv` (what was refused, what is a duplicate) beside them; "copy": the same as copies; "list":
    `into/split.csv` alone.

    Raises:
        DataError: `into` holds something else, or lies within the photos.
        StorageError: no space left or no permission; nothing is left behind.
    """
    _check_target(split.folder, into)
    rows = [_target(split, photo, into, how) for photo in split.photos]
    if into.is_dir() and any(into.iterdir()):
        _check_same(split, rows, into, how)
        return False
    with new_folder(into) as draft:
        if how != "list":
            title = "copying photos" if how == "copy" else "linking photos"
            with storage_errors(into), progress.task(title, len(rows), "photos") as task:
                for photo, row in zip(split.photos, rows, strict=True):
                    _place(photo.path, draft / row.path, how)
                    task.advance()
            write_csv(draft / "findings.csv", ("finding", "group", "path", "class", "detail"), _findings(split))
        write_rows(draft / SPLIT_CSV, rows)
    return True


def _check_target(photos: Path, into: Path) -> None:
    source, target = photos.resolve(), into.resolve()
    if target == source or source in target.parents:
        raise DataError(
            f"{printable(into)} lies within {printable(photos)}, which is never written to",
            "give --into another folder",
        )
    if target in source.parents and target.is_dir() and any(target.iterdir()):
        raise DataError(f"{printable(into)} holds {printable(photos)} itself", "give --into a new folder")
    if into.exists() and not into.is_dir():
        raise DataError(f"{printable(into)} is a file", "give --into a new folder")


def _target(split: Split, photo: Photo, into: Path, how: LinkMode) -> Photo:
    """The row that split.csv will hold: a path within `into`, or the photo's own."""
    if how == "list":
        return Photo(os.path.abspath(photo.path), photo.label, photo.split, photo.sha256)  # noqa: PTH100
    relative = Path(os.path.relpath(photo.path, split.folder)).as_posix()
    return Photo(f"{photo.split}/{relative}", photo.label, photo.split, photo.sha256)


def _check_same(split: Split, rows: list[Photo], into: Path, how: LinkMode) -> None:
    name, remedy = printable(into), "give --into a new folder, or remove this one"
    if not (into / SPLIT_CSV).is_file():
        raise DataError(f"{name} exists and is no split of bnlab", remedy)
    there = [Photo(os.path.relpath(p.path, into), p.label, p.split, p.sha256) for p in read_split_csv(into / SPLIT_CSV)]
    wanted = [Photo(os.path.relpath(into / row.path, into), row.label, row.split, row.sha256) for row in rows]
    if there != wanted:
        raise DataError(f"{name} holds another split (other photos, --val, --test, --seed or --list)", remedy)
    if how == "list":
        return
    for photo, row in zip(split.photos, rows, strict=True):
        path = into / row.path
        if not path.is_file():
            raise DataError(f"{name} is a split that lacks {printable(row.path)}", remedy)
        if how == "copy" and path.samefile(photo.path):
            raise DataError(f"{name} holds the same split as links, not copies", remedy)


def _place(source: str, target: Path, how: LinkMode) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if how == "link":
        try:
            os.link(os.path.realpath(source), target)
            return
        except OSError:
            pass  # another file system, or one without hard links: copy
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
