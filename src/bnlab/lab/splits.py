"""The photos of a study, and how each seed splits them into train, val and test.

Networks are trained on train. What has to be chosen, such as a learning rate, is chosen by val. What is reported is
measured on test, which nothing was chosen by. Each seed splits anew. Splits that DATA has already are kept: its test
split, or else its val split, is test for all seeds, and an interval over the seeds holds for these photos.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bnlab.data import duplicates
from bnlab.data.dataset import open_evaluation_data
from bnlab.data.digits import find_idx_files, write_binary_digits, write_digits
from bnlab.data.photos import Photo
from bnlab.data.scan import Refusal, report_refused, scan, split_folders
from bnlab.data.split import assign_split
from bnlab.data.split_csv import write_split_csv
from bnlab.errors import DataError, plural, printable
from bnlab.files import file_sha256, read_csv, write_csv
from bnlab.progress import Progress

QUICK_PHOTOS = 1000  # the most that a quick study uses of a folder, or of each split of DATA
VAL, TEST = 0.15, 0.3
_COLUMNS = ("path", "label", "given", "sha256", "group")


@dataclass(frozen=True, slots=True)
class _StudyPhoto:
    path: str
    label: str
    given: str
    """The split that DATA gave it, or ""."""
    sha256: str
    group: str
    """The smallest sha256 of its duplicates and itself, which decides its split where DATA does not."""


class StudySplits:
    """The photos of a study. `for_seed` splits them."""

    def __init__(self, name: str, kind: str, folder: Path, photos: Sequence[_StudyPhoto], found: int) -> None:
        self.name = name
        """The name of the data for the report."""
        self.kind = kind
        """"digits" (grey, and changed by a flip) or "photos"."""
        self.photos = tuple(photos)
        self.found = found
        """How many photos DATA has. A quick study uses some of them."""
        self.is_drawn = not any(photo.given for photo in photos)
        """Whether each seed draws test anew. Otherwise DATA gave it, and it is the same for all seeds."""
        self.classes = len({photo.label for photo in photos})
        self._folder = folder

    def __len__(self) -> int:
        return len(self.photos)

    @property
    def overlap(self) -> float:
        """Test photos per train photo if each seed draws them anew, otherwise 0. See `Evidence.overlap`."""
        return TEST / (1 - VAL - TEST) if self.is_drawn else 0.0

    def for_seed(self, seed: int) -> Path:
        """The split.csv of the seed, which is written once.

        Raises:
            DataError: a class has no photo in train or test, or no class has one in val.
        """
        given = {photo.given for photo in self.photos}
        where = str(self._folder.resolve())  # the paths in a split.csv are valid for the folder it was written in
        name = hashlib.sha256(repr((VAL, TEST, where, self.photos)).encode()).hexdigest()[:16]
        path = self._folder / f"{name}-{seed}.csv"
        if not path.exists():
            photos = [Photo(p.path, p.label, _assign_split(p, given, seed), p.sha256) for p in self.photos]
            for split in ("train", "val", "test"):
                missing = {p.label for p in photos} - {p.label for p in photos if p.split == split}
                if missing and (split != "val" or len(missing) == self.classes):
                    raise DataError(
                        f"{self.name} has too few photos of class '{printable(min(missing))}': none fell to {split}",
                        "a study trains, chooses and reports on different photos: give 20 or more of each class",
                    )
            write_split_csv(path, photos)
        return path


def open_study_splits(
    data: Path | None, *, quick: bool, min_photos: int, folder: Path, progress: Progress
) -> StudySplits:
    """Open DATA (IDX files, a split folder, a split.csv or a folder of classes), or else scikit-learn's digits.

    With `quick`, only some of many photos are used, the same each time. Files are written to `folder`.

    Raises:
        DataError: DATA cannot be used, or has fewer than `min_photos` usable photos or two classes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if data is None:
        digits = folder / "digits"
        if not digits.is_dir():
            write_digits(digits)
        name, kind, found = "scikit-learn's digits", "digits", scan(digits)
        photos, refused = [_with_content(photo) for photo in found], list[Refusal]()
    elif files := find_idx_files(data):
        name, kind = f"{printable(data.name)} (IDX, made binary)", "digits"
        found = write_binary_digits(files, folder, progress)
        photos, refused = [_with_content(photo) for photo in _some(found, quick)], []
    else:
        name, kind = printable(data.name or data), "photos"
        found = _found(data)
        photos, refused = _with_duplicates_grouped(_some(found, quick), folder, progress)
    report_refused(refused, strict=False, progress=progress)
    classes = {photo.label for photo in photos}
    if len(classes) < 2 or len(photos) < min_photos:
        raise DataError(
            f"{name} has {plural(len(photos), 'usable photo')} of {len(classes)} class{'es' * (len(classes) != 1)}",
            f"this study needs {min_photos} photos of 2 classes or more",
        )
    return StudySplits(name, kind, folder, photos, len(found))


def _found(data: Path) -> list[Photo]:
    """Photos with the split that DATA gives them."""
    if data.is_file() or split_folders(data) or (data / "split.csv").is_file():
        return list(open_evaluation_data(data, "all")[1])
    return scan(data)


def _some(found: list[Photo], quick: bool) -> list[Photo]:
    """All photos, or for a quick study at most QUICK_PHOTOS of each split, equally many of each class.

    These are the ones whose file names have the smallest digests.
    """
    if not quick:
        return found
    some: list[Photo] = []
    for split in dict.fromkeys(photo.split for photo in found):
        of_split = [photo for photo in found if photo.split == split]
        if len(of_split) > QUICK_PHOTOS:
            labels = {photo.label for photo in of_split}
            left = dict.fromkeys(labels, max(1, QUICK_PHOTOS // len(labels)))
            by_digest = sorted(of_split, key=lambda photo: hashlib.sha256(Path(photo.path).name.encode()).digest())
            of_split = []
            for photo in by_digest:
                left[photo.label] -= 1
                if left[photo.label] >= 0:
                    of_split.append(photo)
        some += of_split
    return sorted(some, key=lambda photo: photo.path)


def _with_content(photo: Photo) -> _StudyPhoto:
    sha256 = file_sha256(photo.path)
    return _StudyPhoto(photo.path, photo.label, photo.split, sha256, sha256)


def _with_duplicates_grouped(
    found: Sequence[Photo], folder: Path, progress: Progress
) -> tuple[list[_StudyPhoto], list[Refusal]]:
    """Usable photos, with duplicates in one group. They are read once, and again only when a file has changed."""
    stats = [(photo.path, photo.label, photo.split, Path(photo.path).stat()) for photo in found]
    key = hashlib.sha256(repr([(*row[:3], row[3].st_size, row[3].st_mtime_ns) for row in stats]).encode()).hexdigest()
    kept = folder / f"examined-{key[:16]}.csv"
    if kept.exists():
        return [_StudyPhoto(*(row[column] for column in _COLUMNS)) for row in read_csv(kept)], []
    usable, refused = duplicates.read_fingerprints(found, progress)
    fingerprints = [fingerprint for _, fingerprint in usable]
    groups = duplicates.group_keys(fingerprints, duplicates.find_groups(fingerprints))
    photos = [
        _StudyPhoto(photo.path, photo.label, photo.split, fingerprint.sha256, group)
        for (photo, fingerprint), group in zip(usable, groups, strict=True)
    ]
    if not refused:  # refused photos are reported each time
        write_csv(kept, _COLUMNS, ([getattr(photo, column) for column in _COLUMNS] for photo in photos))
    return photos, refused


def _assign_split(photo: _StudyPhoto, given: Iterable[str], seed: int) -> str:
    """The split of a photo: drawn where DATA has none. If DATA lacks val, it is drawn from train."""
    if not photo.given:
        return assign_split(photo.group, val=VAL, test=TEST, seed=seed)
    if photo.given == "train":
        both = "test" in given and "val" in given
        return "train" if both else assign_split(photo.group, val=VAL, test=0.0, seed=seed)
    return "test" if "test" not in given else photo.given
