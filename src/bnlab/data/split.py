"""Which photo is train, val or test: decided by its content and the seed alone, so that it never moves.

A photo's side follows from a hash of the seed and its SHA-256. Others may come or go: it stays. Duplicates share the
side of the one among them whose SHA-256 is smallest, so only a photo's own duplicates can move it.
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bnlab.data import duplicates
from bnlab.data.duplicates import Fingerprint, Group
from bnlab.data.scan import Found, Refusal, examine, scan
from bnlab.errors import DataError, printable
from bnlab.files import new_folder, read_csv, write_csv
from bnlab.progress import Progress

SPLITS = ("train", "val", "test")
COLUMNS = ("path", "class", "split", "sha256")
LIST_NAME = "split.csv"
How = Literal["link", "copy", "list"]


@dataclass(frozen=True, slots=True)
class Photo:
    """One row of split.csv."""

    path: str
    """where the file lies"""
    label: str
    """its class"""
    split: str
    """train, val or test"""
    sha256: str
    """of the file; empty where it is not known"""


@dataclass(frozen=True, kw_only=True)
class Split:
    """A folder of classes, split."""

    folder: Path
    photos: list[Photo]
    """in the order of their class and path"""
    refused: list[Refusal]
    groups: list[Group]
    """duplicates, by position in `photos`"""

    @property
    def classes(self) -> list[str]:
        """Names, sorted: the position of a name is its index in the network."""
        return sorted({photo.label for photo in self.photos})

    @property
    def conflicts(self) -> list[Group]:
        """Groups of duplicates whose members stand in different classes: at least one label is wrong."""
        return [group for group in self.groups if len({self.photos[i].label for i in group.members}) > 1]

    def counts(self) -> dict[str, dict[str, int]]:
        """Class to split to number of photos."""
        return count_photos(self.photos)


def count_photos(photos: Iterable[Photo]) -> dict[str, dict[str, int]]:
    """Class to split to number of photos, classes sorted."""
    photos = list(photos)
    count = Counter((photo.label, photo.split) for photo in photos)
    return {c: {s: count[c, s] for s in SPLITS} for c in sorted({photo.label for photo in photos})}


def side(sha256: str, *, val: float, test: float, seed: int) -> str:
    """The side of a photo with this content: a number in [0, 1) hashed from it, held against `val` and `val + test`."""
    digest = hashlib.sha256(f"{seed}:{sha256}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    return "val" if draw < val else "test" if draw < val + test else "train"


def split_folder(folder: Path, *, val: float, test: float, seed: int, progress: Progress) -> Split:
    """Read every photo of a folder of classes and decide its side.

    Raises:
        DataError: no such folder, no or one class, an empty class, or too few photos for the sides asked for.
    """
    if not (val >= 0 and test >= 0 and 0 < val + test < 1):
        raise DataError(
            f"val {val} and test {test} leave nothing to split", "give shares that add up to between 0 and 1"
        )
    found = scan(folder)
    examined, refused = examine(
        found, duplicates.fingerprint, title="reading photos", total=len(found), progress=progress
    )
    groups = duplicates.groups([fingerprint for _, fingerprint in examined])
    photos = _assigned(examined, groups, val=val, test=test, seed=seed)
    _check(folder, found, photos, refused, val=val, test=test)
    return Split(folder=folder, photos=photos, refused=refused, groups=groups)


def _assigned(
    examined: Sequence[tuple[Found, Fingerprint]], groups: Iterable[Group], *, val: float, test: float, seed: int
) -> list[Photo]:
    decides = [fingerprint.sha256 for _, fingerprint in examined]
    for group in groups:
        smallest = min(decides[i] for i in group.members)
        for i in group.members:
            decides[i] = smallest
    return [
        Photo(found.path, found.label, side(key, val=val, test=test, seed=seed), fingerprint.sha256)
        for (found, fingerprint), key in zip(examined, decides, strict=True)
    ]


def _check(
    folder: Path, found: Iterable[Found], photos: list[Photo], refused: list[Refusal], *, val: float, test: float
) -> None:
    name = printable(folder)
    counts = count_photos(photos)
    labels = sorted({one.label for one in found})
    for label in labels:
        if label not in counts:
            reason = next(r for r in refused if r.path.startswith(str(folder / label))).reason
            raise DataError(
                f"class '{printable(label)}' in {name} has no photo that can be used (the first: {reason})",
                "replace its photos or remove the folder",
            )
    check_classes(labels, name)
    for label in labels:
        if not counts[label]["train"]:
            number = sum(counts[label].values())
            raise DataError(
                f"class '{printable(label)}' in {name} has {number} photo{'s' * (number != 1)}, and none fell to train",
                "add photos, hold out less or take another --seed",
            )
    for wanted, split in ((val, "val"), (test, "test")):
        if wanted and not any(counts[label][split] for label in labels):
            raise DataError(
                f"{name} has {len(photos)} photos, too few for a {split} share of {wanted}: none fell to it",
                f"add photos, raise --{split} or take another --seed",
            )


def check_classes(labels: Sequence[str], where: str) -> None:
    """Refuse fewer than two classes.

    Raises:
        DataError: there is one class only, or none.
    """
    if len(labels) < 2:
        only = f"one class only, '{printable(labels[0])}'" if labels else "no classes"
        raise DataError(f"{where} has {only}", "a classifier tells at least two apart; add another sub-folder")


def write_split(split: Split, into: Path, how: How, progress: Progress) -> bool:
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
            with progress.task("copying photos" if how == "copy" else "linking photos", len(rows), "photos") as task:
                for photo, row in zip(split.photos, rows, strict=True):
                    _place(photo.path, draft / row.path, how)
                    task.advance()
            write_csv(draft / "findings.csv", ("finding", "group", "path", "detail"), _findings(split))
        _write_rows(draft / LIST_NAME, rows)
    return True


def write_list(path: Path, photos: Iterable[Photo]) -> None:
    """Write split.csv with absolute paths."""
    _write_rows(path, (Photo(os.path.abspath(p.path), p.label, p.split, p.sha256) for p in photos))  # noqa: PTH100 (links are kept)


def read_list(path: Path) -> list[Photo]:
    """Read split.csv; relative paths start at its own folder.

    Raises:
        DataError: it cannot be read or is no such list.
    """
    try:
        photos = []
        for number, row in enumerate(read_csv(path), start=2):
            missing = [column for column in COLUMNS[:3] if not row.get(column)]
            if missing:
                raise DataError(
                    f"{printable(path)} has no '{missing[0]}' in row {number}",
                    f"it needs the columns {', '.join(COLUMNS)}",
                )
            if row["split"] not in SPLITS:
                raise DataError(
                    f"{printable(path)} has the split '{printable(row['split'])}' in row {number}",
                    f"say {', '.join(SPLITS)}",
                )
            photos.append(Photo(str(path.parent / row["path"]), row["class"], row["split"], row.get("sha256") or ""))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise DataError(f"{printable(path)} cannot be read ({error})", "give a split.csv that bnlab wrote") from None
    if not photos:
        raise DataError(f"{printable(path)} lists no photos", f"it needs the columns {', '.join(COLUMNS)}")
    return photos


def _write_rows(path: Path, photos: Iterable[Photo]) -> None:
    write_csv(path, COLUMNS, ((p.path, p.label, p.split, p.sha256) for p in photos))


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


def _target(split: Split, photo: Photo, into: Path, how: How) -> Photo:
    """The row that split.csv will hold: a path within `into`, or the photo's own."""
    if how == "list":
        return Photo(os.path.abspath(photo.path), photo.label, photo.split, photo.sha256)  # noqa: PTH100
    relative = os.path.relpath(photo.path, split.folder)
    return Photo(os.path.join(photo.split, relative), photo.label, photo.split, photo.sha256)  # noqa: PTH118


def _check_same(split: Split, rows: list[Photo], into: Path, how: How) -> None:
    name, remedy = printable(into), "give --into a new folder, or remove this one"
    if not (into / LIST_NAME).is_file():
        raise DataError(f"{name} exists and is no split of bnlab", remedy)
    there = [Photo(os.path.relpath(p.path, into), p.label, p.split, p.sha256) for p in read_list(into / LIST_NAME)]
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


def _place(source: str, target: Path, how: How) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if how == "link":
        try:
            os.link(os.path.realpath(source), target)
            return
        except OSError:
            pass  # another file system, or one without hard links: copy
    shutil.copy2(source, target)


def _findings(split: Split) -> Iterator[tuple[str, object, str, str]]:
    for refusal in split.refused:
        yield "refused", "", refusal.path, refusal.reason
    conflicts = set(split.conflicts)
    for number, group in enumerate(split.groups, start=1):
        kind = "duplicate" if group.exact else "near duplicate"
        if group in conflicts:
            kind += ", label conflict"
        for i in group.members:
            yield kind, number, split.photos[i].path, split.photos[i].label
