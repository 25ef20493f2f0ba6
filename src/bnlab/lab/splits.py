"""The photos of a study, and how each seed splits them into train, val and test.

Networks are trained on train. What has to be chosen, such as a learning rate, is chosen by val. What is reported is
measured on test, which nothing was chosen by. Each seed splits anew. Splits that DATA has already are kept: its test
split, or else its val split, is test for all seeds, and an interval over the seeds holds for these photos.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bnlab.data import duplicates
from bnlab.data.dataset import open_evaluation_data
from bnlab.data.digits import find_idx_files, write_binary_digits, write_digits
from bnlab.data.photo_file import PhotoReader
from bnlab.data.photos import ERRORS, Photo, Stamp
from bnlab.data.scan import Refusal, report_refused, scan
from bnlab.data.split import assign_splits
from bnlab.data.split_csv import SPLITS, write_split_csv
from bnlab.data.verify import read_content, stamp_of
from bnlab.errors import DataError, PhotoError, plural, printable
from bnlab.files import read_csv, write_csv
from bnlab.progress import Progress

QUICK_PHOTOS = 1000  # the most that a quick study uses of a folder, or of each split of DATA
VAL, TEST = 0.15, 0.3


@dataclass(frozen=True, slots=True)
class _StudyPhoto(Photo):
    """A photo with the split that DATA gives it, if DATA has splits."""

    group: str = ""  # The smallest sha256 of its duplicates and itself, which decides its split where DATA does not.


@dataclass
class StudySplits:
    """The photos of a study. `for_seed` splits them."""

    name: str
    kind: str  # "digits" (grey, and changed by a flip) or "photos".
    folder: Path  # Where the split.csv of each seed is written.
    photos: Sequence[_StudyPhoto]
    found: int  # How many photos DATA has. A quick study uses some of them.
    refused: Sequence[Refusal] = ()

    def __len__(self) -> int:
        return len(self.photos)

    @property
    def classes(self) -> int:
        return len({photo.label for photo in self.photos})

    @property
    def is_drawn(self) -> bool:
        """Whether each seed draws test anew. Otherwise DATA gave it, and it is the same for all seeds."""
        return not any(photo.split in SPLITS for photo in self.photos)

    @property
    def overlap(self) -> float:
        """Test photos per train photo if each seed draws them anew, otherwise 0. See `Evidence.overlap`."""
        return TEST / (1 - VAL - TEST) if self.is_drawn else 0.0

    def for_seed(self, seed: int) -> Path:
        """The split.csv of the seed, which is written once.

        Raises:
            DataError: a class has no photo in train or test, or no class has one in val.
        """
        where = str(self.folder.resolve())  # the paths in a split.csv are valid for the folder it was written in
        rule = "nearest"  # that of assign_splits: a list that another rule has written is not used
        name = hashlib.sha256(repr((rule, VAL, TEST, where, list(self.photos))).encode()).hexdigest()[:16]
        path = self.folder / f"{name}-{seed}.csv"
        if not path.exists():
            photos = self._assigned(seed)
            for split in SPLITS:
                missing = {p.label for p in photos} - {p.label for p in photos if p.split == split}
                if missing and (split != "val" or len(missing) == self.classes):
                    raise DataError(
                        f"{self.name} has too few photos of class '{printable(min(missing))}': none fell to {split}",
                        "a study trains, chooses and reports on different photos: give 20 or more of each class",
                    )
            write_split_csv(path, photos)
        return path

    def _assigned(self, seed: int) -> list[Photo]:
        """The photos with their splits: drawn where DATA has none. If DATA lacks val, it is drawn from train."""
        given = {photo.split for photo in self.photos}
        has_val = {"val", "test"} <= given  # otherwise val, if there is any, is the test split
        is_free = [self.is_drawn or (photo.split == "train" and not has_val) for photo in self.photos]
        free = [(photo.label, photo.group) for photo, to_assign in zip(self.photos, is_free, strict=True) if to_assign]
        drawn = iter(assign_splits(free, val=VAL, test=TEST if self.is_drawn else 0.0, seed=seed))
        splits = [
            next(drawn) if to_assign else photo.split if "test" in given else "test"
            for photo, to_assign in zip(self.photos, is_free, strict=True)
        ]
        return [Photo(p.path, p.label, split, p.sha256, p.stamp) for p, split in zip(self.photos, splits, strict=True)]


def open_study_splits(
    data: Path | None,
    *,
    quick: bool,
    min_photos: int,
    folder: Path,
    progress: Progress,
    reader: PhotoReader | None = None,
) -> StudySplits:
    """Open DATA (IDX files, a split folder, a split.csv or a folder of classes), or else scikit-learn's digits.

    With `quick`, only some of many photos are used, the same each time. Files are written to `folder`.
    `reader` (default: one with the default settings) opens the photos.

    Raises:
        DataError: DATA cannot be used, or has fewer than `min_photos` usable photos or two classes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    refused: list[Refusal] = []
    if data is None:
        digits = folder / "digits"
        if not digits.is_dir():
            write_digits(digits)
        name, kind, found = "scikit-learn's digits", "digits", scan(digits, [])
    elif files := find_idx_files(data):
        name, kind = f"{printable(data.name)} (IDX, made binary)", "digits"
        found = write_binary_digits(files, folder, progress)
    else:
        name, kind = printable(data.name or data), "photos"
        found = list(open_evaluation_data(data, "all", refused, progress)[1])
        report_refused(refused, strict=False, progress=progress)
    used = _some(found) if quick and data else found  # the bundled digits are few enough
    if kind == "photos":
        photos, broken = _examined(used, folder, progress, reader or PhotoReader())
        refused += broken
    else:
        photos = [_with_content(photo) for photo in used]
    number, classes = len(photos), len({photo.label for photo in photos})
    if classes < 2 or number < min_photos:
        raise DataError(
            f"{name} has {plural(number, 'usable photo')} of {plural(classes, 'class')}",
            f"this study needs {min_photos} photos of 2 classes or more",
        )
    return StudySplits(name, kind, folder, photos, len(found), refused)


def _some(found: Sequence[Photo]) -> list[Photo]:
    """At most QUICK_PHOTOS of each split, equally many of each class: those whose file names have the least digests."""
    of_split = Counter(photo.split for photo in found)
    classes = Counter(split for split, _ in {(photo.split, photo.label) for photo in found})
    taken: Counter[tuple[str, str]] = Counter()
    some = []
    for photo in sorted(found, key=_name_digest):
        taken[photo.split, photo.label] += 1
        most = max(1, QUICK_PHOTOS // classes[photo.split])
        if of_split[photo.split] <= QUICK_PHOTOS or taken[photo.split, photo.label] <= most:
            some.append(photo)
    return sorted(some, key=lambda photo: photo.path)


def _name_digest(photo: Photo) -> bytes:
    return hashlib.sha256(Path(photo.path).name.encode("utf-8", ERRORS)).digest()


def _with_content(photo: Photo) -> _StudyPhoto:
    sha256, stamp = read_content(photo.path)
    return _StudyPhoto(photo.path, photo.label, photo.split, sha256, stamp, sha256)


def _examined(
    found: Sequence[Photo], folder: Path, progress: Progress, reader: PhotoReader
) -> tuple[list[_StudyPhoto], list[Refusal]]:
    """Usable photos, with duplicates in one group, and the others.

    They are read once, and again only when a file has changed.
    """
    columns = ("path", "label", "split", "sha256", "group")
    stamps = {photo.path: _stamp(photo.path) for photo in found}
    settings = reader.pixel_range, reader.max_megapixels
    state = columns, settings, [(photo.path, photo.label, photo.split, *stamps[photo.path]) for photo in found]
    kept = folder / f"examined-{hashlib.sha256(repr(state).encode()).hexdigest()[:16]}.csv"
    if kept.exists():
        return [_StudyPhoto(**row, stamp=stamps[row["path"]]) for row in read_csv(kept)], []
    usable, refused = duplicates.read_fingerprints(found, progress, reader)
    report_refused(refused, strict=False, progress=progress)
    warned = reader.report(progress)
    fingerprints = [fingerprint for _, fingerprint in usable]
    groups = duplicates.group_keys(fingerprints, duplicates.find_groups(fingerprints))
    photos = [
        _StudyPhoto(photo.path, photo.label, photo.split, fingerprint.sha256, fingerprint.stamp, group)
        for (photo, fingerprint), group in zip(usable, groups, strict=True)
    ]
    if not refused and not warned:  # otherwise they are read, and warned of, each time
        write_csv(kept, columns, ([getattr(photo, column) for column in columns] for photo in photos))
    return photos, refused


def _stamp(path: str) -> Stamp:
    """The stamp of a file; zeros if it cannot be read, which is found out when it is opened."""
    try:
        return stamp_of(path)
    except PhotoError:
        return 0, 0
