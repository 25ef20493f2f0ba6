"""Read and write split.csv, the list of photos with their class, split and SHA-256."""

import csv
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bnlab.data.photos import Photo, Photos
from bnlab.errors import DataError, printable
from bnlab.files import read_csv, write_csv
from bnlab.progress import Progress

SPLITS = ("train", "val", "test")
COLUMNS = ("path", "class", "split", "sha256")
SPLIT_CSV = "split.csv"
_UNUSUAL = re.compile(r"//|(^|/)\.(/|$)|/$")  # in a path: what pathlib leaves out


def as_label(name: str) -> str:
    """A class name in Unicode's composed form: macOS writes é as two characters in file names, other systems as one."""
    return unicodedata.normalize("NFC", name)


def count_photos(photos: Iterable[Photo]) -> dict[str, dict[str, int]]:
    """Number of photos by class and split, classes sorted."""
    photos = Photos.of(photos)
    count = photos.counts()
    return {label: {split: count[label, split] for split in SPLITS} for label in photos.labels}


def check_classes(labels: Sequence[str], where: str) -> None:
    """Raise a DataError if there are fewer than two classes."""
    if len(labels) < 2:
        only = f"only one class, '{printable(labels[0])}'" if labels else "no classes"
        raise DataError(f"{where} has {only}", "a classifier needs two or more: add another sub-folder")


def report_missing_classes(photos: Iterable[Photo], split: str, progress: Progress) -> None:
    """Warn of each class that has no photo in a split."""
    for label, counts in count_photos(photos).items():
        if not counts[split]:
            progress.warn(
                f"{split} has no photo of class '{printable(label)}', so its accuracy will not be measured: "
                f"hold out more photos or use another --seed (of train: --split-seed)"
            )


def write_split_csv(path: Path, photos: Iterable[Photo], *, absolute: bool = True) -> None:
    """Write split.csv, with absolute paths or with the photos' paths as they are. Symbolic links are kept."""
    as_written = os.path.abspath if absolute else str
    write_csv(path, COLUMNS, ((as_written(p.path), p.label, p.split, p.sha256) for p in photos))


def read_split_csv(path: Path) -> Photos:
    """Read split.csv. Relative paths are relative to its own folder.

    Raises:
        DataError: the file cannot be read or is not a split.csv.
    """
    try:
        photos = Photos.of(_rows(path))
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{printable(path)} cannot be read ({reason})", "use a split.csv that bnlab wrote") from None
    if not photos:
        raise DataError(f"{printable(path)} lists no photos", f"it needs the columns {', '.join(COLUMNS)}")
    return photos


def _rows(path: Path) -> Iterator[Photo]:
    folder = "" if path.parent == Path() else str(path.parent)
    for number, row in enumerate(read_csv(path), start=2):
        if not {"path", "class", "split"} <= row.keys():
            raise DataError(f"{printable(path)} is not a split.csv", f"it needs the columns {', '.join(COLUMNS)}")
        missing = [column for column in COLUMNS[:3] if not row[column]]
        if missing:
            raise DataError(f"{printable(path)} has no '{missing[0]}' in row {number}", "fill it in")
        if row["split"] not in SPLITS:
            raise DataError(
                f"{printable(path)} has the split '{printable(row['split'])}' in row {number}",
                f"use {', '.join(SPLITS)}",
            )
        where = os.path.join(folder, row["path"])  # noqa: PTH118 (pathlib takes most of the time of a long list)
        if os.sep != "/" or _UNUSUAL.search(where):
            where = str(Path(where))
        yield Photo(where, as_label(row["class"]), row["split"], row.get("sha256") or "")
