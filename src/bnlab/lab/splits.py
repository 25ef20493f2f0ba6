"""The photos of a study: which there are, and for each seed which are trained on, chosen by and reported.

Three sides. Networks are trained on `train`; what has to be chosen, such as a learning rate, is chosen by `val`; what
is reported was measured on `test`, which nothing was chosen by. Each seed splits anew. Sides that DATA has already
stay: its test (or else its val) is `test`, the same for all seeds, and an interval over them is for these photos.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bnlab.data import duplicates, mnist_idx
from bnlab.data.dataset import open_evaluation_data
from bnlab.data.digits import write_digits
from bnlab.data.photos import Photo
from bnlab.data.scan import PhotoFile, Refusal, report_refused, scan, split_folders
from bnlab.data.split import assign_split
from bnlab.data.split_csv import write_split_csv
from bnlab.errors import DataError, plural, printable
from bnlab.files import file_sha256, read_csv, write_csv
from bnlab.progress import Progress

QUICK_PHOTOS = 1000  # of a folder, or of each of its sides, that a quick study looks at
VAL, TEST = 0.15, 0.3
_COLUMNS = ("path", "label", "given", "sha256", "group")


@dataclass(frozen=True, slots=True)
class _Known:
    """A photo, the side that DATA gave it ("" for none), and what decides its side else: its group's content."""

    path: str
    label: str
    given: str
    sha256: str
    group: str


class StudySplits:
    """The photos of a study; `of` gives each seed's list."""

    def __init__(self, name: str, kind: str, folder: Path, photos: Sequence[_Known], found: int) -> None:
        self.name = name
        """of the data, for the report"""
        self.kind = kind
        """digits (grey, of which no mirror image is another) or photos"""
        self.photos = tuple(photos)
        self.found = found
        """how many photos DATA has, of which a quick study takes a part"""
        self.is_drawn = not any(photo.given for photo in photos)
        """whether each seed draws test anew; else DATA gave it, and it is the same for all"""
        self.classes = len({photo.label for photo in photos})
        self._folder = folder

    def __len__(self) -> int:
        return len(self.photos)

    @property
    def overlap(self) -> float:
        """Test photos to each of train, where each seed draws them anew; else 0."""
        return TEST / (1 - VAL - TEST) if self.is_drawn else 0.0

    def for_seed(self, seed: int) -> Path:
        """The list of photos with the sides that follow from the seed; written once."""
        given = {photo.given for photo in self.photos}
        where = str(self._folder.resolve())  # paths in a list hold for where it was written
        name = hashlib.sha256(repr((VAL, TEST, where, self.photos)).encode()).hexdigest()[:16]
        path = self._folder / f"{name}-{seed}.csv"
        if not path.exists():
            photos = [Photo(p.path, p.label, _assign_split(p, given, seed), p.sha256) for p in self.photos]
            for wanted in ("train", "val", "test"):
                missing = {p.label for p in photos} - {p.label for p in photos if p.split == wanted}
                if missing and (wanted != "val" or len(missing) == self.classes):
                    raise DataError(
                        f"{self.name} has too few photos of class '{printable(min(missing))}': none fell to {wanted}",
                        "a study trains, chooses and reports on different photos: give 20 or more of each class",
                    )
            write_split_csv(path, photos)
        return path


def open_study_splits(
    data: Path | None, *, quick: bool, min_photos: int, folder: Path, progress: Progress
) -> StudySplits:
    """The photos of DATA (IDX files, a split folder, a split.csv or a folder of classes), or the bundled digits.

    `quick` takes a part of many, always the same; `min_photos` is how many the study needs.

    Raises:
        DataError: DATA is nothing to study, or too little.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if data is None:
        digits = folder / "digits"
        if not digits.is_dir():
            write_digits(digits)
        name, kind, found = "scikit-learn's digits", "digits", [(one, "") for one in scan(digits)]
        refused: list[Refusal] = []
        known = [_of_content(one, given) for one, given in found]
    elif files := mnist_idx.find_pairs(data):
        name, kind = f"{printable(data.name)} (IDX, made binary)", "digits"
        found = mnist_idx.write_binary_digits(files, folder, progress)
        refused, known = [], [_of_content(one, given) for one, given in _part(found, quick)]
    else:
        name, kind = printable(data.name or data), "photos"
        found = _found(data)
        known, refused = _examined(_part(found, quick), folder, progress)
    report_refused(refused, strict=False, progress=progress)
    classes = {photo.label for photo in known}
    if len(classes) < 2 or len(known) < min_photos:
        raise DataError(
            f"{name} has {plural(len(known), 'usable photo')} of {len(classes)} class{'es' * (len(classes) != 1)}",
            f"this study needs {min_photos} photos of 2 classes or more",
        )
    return StudySplits(name, kind, folder, known, len(found))


def _found(data: Path) -> list[tuple[PhotoFile, str]]:
    """Photos with the side that DATA gives them."""
    if data.is_file() or split_folders(data) or (data / "split.csv").is_file():
        _, photos = open_evaluation_data(data, "all")
        return [(PhotoFile(photo.path, photo.label), photo.split) for photo in photos]
    return [(one, "") for one in scan(data)]


def _part(found: Sequence[tuple[PhotoFile, str]], quick: bool) -> list[tuple[PhotoFile, str]]:
    """Of each side as many of each class, those whose names' digests are smallest; or all."""
    if not quick:
        return list(found)
    chosen: list[tuple[PhotoFile, str]] = []
    for side_given in dict.fromkeys(given for _, given in found):
        of_side = [pair for pair in found if pair[1] == side_given]
        if len(of_side) > QUICK_PHOTOS:
            of_side = _of_each_class(of_side, QUICK_PHOTOS // len({one.label for one, _ in of_side}))
        chosen += of_side
    return sorted(chosen, key=lambda pair: pair[0].path)


def _of_each_class(found: Sequence[tuple[PhotoFile, str]], number: int) -> list[tuple[PhotoFile, str]]:
    left = dict.fromkeys((one.label for one, _ in found), max(1, number))
    chosen = []
    for pair in sorted(found, key=lambda pair: hashlib.sha256(Path(pair[0].path).name.encode()).digest()):
        left[pair[0].label] -= 1
        if left[pair[0].label] >= 0:
            chosen.append(pair)
    return chosen


def _of_content(one: PhotoFile, given: str) -> _Known:
    sha256 = file_sha256(one.path)
    return _Known(one.path, one.label, given, sha256, sha256)


def _examined(
    found: Sequence[tuple[PhotoFile, str]], folder: Path, progress: Progress
) -> tuple[list[_Known], list[Refusal]]:
    """Photos that can be used, duplicates in groups; looked at once, and again when a file has changed."""
    stats = [(one.path, one.label, given, Path(one.path).stat()) for one, given in found]
    key = hashlib.sha256(repr([(*row[:3], row[3].st_size, row[3].st_mtime_ns) for row in stats]).encode()).hexdigest()
    kept = folder / f"examined-{key[:16]}.csv"
    if kept.exists():
        return [_Known(*(row[column] for column in _COLUMNS)) for row in read_csv(kept)], []
    examined, refused = duplicates.read_fingerprints([one for one, _ in found], progress)
    fingerprints = [fingerprint for _, fingerprint in examined]
    keys = duplicates.group_keys(fingerprints, duplicates.find_groups(fingerprints))
    given_of = {one.path: given for one, given in found}
    known = [
        _Known(one.path, one.label, given_of[one.path], fingerprint.sha256, group)
        for (one, fingerprint), group in zip(examined, keys, strict=True)
    ]
    if not refused:  # what was refused is told each time
        write_csv(kept, _COLUMNS, ([getattr(photo, column) for column in _COLUMNS] for photo in known))
    return known, refused


def _assign_split(photo: _Known, given: Iterable[str], seed: int) -> str:
    """Where DATA has no sides all three are drawn; else what it did not give is drawn from its train."""
    if not photo.given:
        return assign_split(photo.group, val=VAL, test=TEST, seed=seed)
    if photo.given == "train":
        both = "test" in given and "val" in given
        return "train" if both else assign_split(photo.group, val=VAL, test=0.0, seed=seed)
    return "test" if "test" not in given else photo.given
