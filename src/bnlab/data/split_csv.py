"""The list of photos: which file is of which class and on which side, as split.csv has it."""

import csv
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from bnlab.data.photos import Photo, Photos
from bnlab.errors import DataError, printable
from bnlab.files import read_csv, write_csv
from bnlab.progress import Progress

SPLITS = ("train", "val", "test")
COLUMNS = ("path", "class", "split", "sha256")
SPLIT_CSV = "split.csv"


def as_label(name: str) -> str:
    """A class's name in Unicode's composed form: a Mac writes é as two characters in file names, others as one."""
    return unicodedata.normalize("NFC", name)


def count_photos(photos: Iterable[Photo]) -> dict[str, dict[str, int]]:
    """Class to split to number of photos, classes sorted."""
    photos = Photos.of(photos)
    count = photos.counts()
    return {label: {split: count[label, split] for split in SPLITS} for label in photos.labels}


def check_classes(labels: Sequence[str], where: str) -> None:
    """Refuse fewer than two classes.

    Raises:
        DataError: there is one class only, or none.
    """
    if len(labels) < 2:
        only = f"one class only, '{printable(labels[0])}'" if labels else "no classes"
        raise DataError(f"{where} has {only}", "a classifier tells at least two apart; add another sub-folder")


def report_missing_classes(photos: Iterable[Photo], split: str, progress: Progress) -> None:
    """Warn of each class that has no photo on a side."""
    for label, sides in count_photos(photos).items():
        if not sides[split]:
            progress.warn(
                f"{split} has no photo of class '{printable(label)}', so how well it is known will not be measured: "
                f"hold out more or take another --seed"
            )


def write_split_csv(path: Path, photos: Iterable[Photo]) -> None:
    """Write split.csv with absolute paths."""
    write_rows(path, (Photo(os.path.abspath(p.path), p.label, p.split, p.sha256) for p in photos))  # noqa: PTH100 (links are kept)


def write_rows(path: Path, photos: Iterable[Photo]) -> None:
    """Write split.csv with the paths as they are."""
    write_csv(path, COLUMNS, ((p.path, p.label, p.split, p.sha256) for p in photos))


def read_split_csv(path: Path) -> Photos:
    """Read split.csv; relative paths start at its own folder.

    Raises:
        DataError: it cannot be read or is no such list.
    """
    try:
        photos = Photos.of(_rows(path))
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{printable(path)} cannot be read ({reason})", "give a split.csv that bnlab wrote") from None
    if not photos:
        raise DataError(f"{printable(path)} lists no photos", f"it needs the columns {', '.join(COLUMNS)}")
    return photos


def _rows(path: Path) -> Iterator[Photo]:
    for number, row in enumerate(read_csv(path), start=2):
        if not {"path", "class", "split"} <= row.keys():
            raise DataError(f"{printable(path)} is no split.csv", f"it needs the columns {', '.join(COLUMNS)}")
        missing = [column for column in COLUMNS[:3] if not row[column]]
        if missing:
            raise DataError(f"{printable(path)} has no '{missing[0]}' in row {number}", "fill it in")
        if row["split"] not in SPLITS:
            raise DataError(
                f"{printable(path)} has the split '{printable(row['split'])}' in row {number}",
                f"say {', '.join(SPLITS)}",
            )
        where = _within(path.parent, row["path"])
        yield Photo(where, as_label(row["class"]), row["split"], row.get("sha256") or "")


def _within(folder: Path, path: str) -> str:
    """`str(folder / path)`, for which pathlib takes most of the time that a long list is read in."""
    name = path.rpartition("/")[2]
    if os.sep != "/" or name in ("", "."):
        return str(folder / path)
    return _start(folder, path[: len(path) - len(name)]) + name


@lru_cache(maxsize=10_000)
def _start(folder: Path, path: str) -> str:
    start = str(folder / path)
    return "" if start == "." else start if start.endswith("/") else start + "/"
