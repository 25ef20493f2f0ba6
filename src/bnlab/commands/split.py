"""`bnlab split`: split a folder of classes into train, val and test."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnlab.data.duplicates import Group
from bnlab.data.photo_file import PhotoReader
from bnlab.data.photos import Photo
from bnlab.data.scan import Result, report_refused
from bnlab.data.split import Split, split_folder, write_split
from bnlab.data.split_csv import SPLITS, report_missing_classes
from bnlab.errors import plural
from bnlab.options import SplitOptions
from bnlab.progress import LoggedProgress, Progress


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Two or more photos that show the same, all in one split."""

    photos: tuple[Photo, ...]  # each with path, label, split and sha256
    exact: bool  # whether all of them are identical to the byte

    @property
    def paths(self) -> list[str]:
        return [photo.path for photo in self.photos]

    @property
    def labels(self) -> list[str]:
        return [photo.label for photo in self.photos]

    def to_json(self) -> dict[str, Any]:
        listed = [{"path": photo.path, "class": photo.label, "split": photo.split} for photo in self.photos]
        return {"exact": self.exact, "photos": listed}


@dataclass(frozen=True, kw_only=True)
class SplitResult(Result):
    """The split, its folder, and whether this call wrote it (or it was there already)."""

    split: Split
    folder: Path  # the new one, which is DATA for a training
    written: bool

    @property
    def photos(self) -> list[Photo]:
        """All photos with their class (`label`), split and SHA-256, in the order of class and path."""
        return self.split.photos

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Number of photos by class and split, such as `counts["tulips"]["train"]`."""
        return self.split.counts()

    @property
    def duplicates(self) -> list[Duplicates]:
        """All groups of photos that show the same."""
        return self._named(self.split.groups)

    @property
    def label_conflicts(self) -> list[Duplicates]:
        """The groups with photos in several classes: at least one label is wrong."""
        return self._named(self.split.conflicts)

    def __repr__(self) -> str:
        splits = Counter(photo.split for photo in self.photos)
        parts = [f"{splits[split]} {split}" for split in SPLITS if splits[split]]
        classes = plural(len({photo.label for photo in self.photos}), "class")
        return self._line(f"{self.folder}", classes, plural(len(self.photos), "photo"), *parts)

    def _named(self, groups: Iterable[Group]) -> list[Duplicates]:
        return [Duplicates(photos=tuple(self.photos[i] for i in group.members), exact=group.exact) for group in groups]

    def to_json(self) -> dict[str, Any]:
        return {
            "into": str(self.folder),
            "written": self.written,
            "counts": self.counts,
            "refused": [{"path": refusal.path, "reason": refusal.reason} for refusal in self.refused],
            "duplicates": [group.to_json() for group in self.duplicates],
            "label_conflicts": [group.to_json() for group in self.label_conflicts],
        }


def run(options: SplitOptions, progress: Progress) -> SplitResult:
    """Split the photos, and write the split unless it is there already."""
    progress = LoggedProgress(progress)
    reader = PhotoReader(pixel_range=options.pixel_range, max_megapixels=options.max_megapixels)
    split = split_folder(
        options.photos, val=options.val, test=options.test, seed=options.seed, progress=progress, reader=reader
    )
    report_refused(split.refused, strict=options.strict, progress=progress)
    reader.report(progress)
    for name, fraction in (("val", options.val), ("test", options.test)):
        if fraction:
            report_missing_classes(split.photos, name, progress)
    written = write_split(split, options.into, options.how, progress)
    return SplitResult(
        split=split,
        folder=options.into,
        written=written,
        warnings=tuple(progress.warnings),
        refused=tuple(split.refused),
    )
