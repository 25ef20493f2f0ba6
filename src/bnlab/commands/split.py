"""`bnlab split`: a folder of classes becomes train, val and test."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnlab.data.scan import report_refused
from bnlab.data.split import Split, split_folder
from bnlab.data.split_csv import report_missing_classes
from bnlab.data.write_split import LinkMode, write_split
from bnlab.progress import Progress


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """What `bnlab split` is told."""

    photos: Path
    """folder with one sub-folder a class; it is never written to"""
    into: Path
    """new folder for train/, val/, test/ and split.csv"""
    val: float = 0.1
    """share held out for validation"""
    test: float = 0.0
    """share held out for testing"""
    seed: int = 0
    """another seed, another split"""
    how: LinkMode = "link"
    """hard links (copies where there are none), copies, or only the list"""
    strict: bool = False
    """refuse to go on when a photo cannot be used"""


@dataclass(frozen=True, kw_only=True)
class SplitResult:
    """The split, where it lies, and whether it was written now (or lay there already)."""

    split: Split
    into: Path
    written: bool

    def to_json(self) -> dict[str, Any]:
        """The document of `bnlab split --json`."""
        photos = self.split.photos
        conflicts = set(self.split.conflicts)

        def group(members: tuple[int, ...]) -> list[dict[str, str]]:
            return [{"path": photos[i].path, "class": photos[i].label, "split": photos[i].split} for i in members]

        return {
            "into": str(self.into),
            "written": self.written,
            "counts": self.split.counts(),
            "refused": [{"path": refusal.path, "reason": refusal.reason} for refusal in self.split.refused],
            "duplicates": [{"exact": g.exact, "photos": group(g.members)} for g in self.split.groups],
            "label_conflicts": [
                {"exact": g.exact, "photos": group(g.members)} for g in self.split.groups if g in conflicts
            ],
        }


def run(settings: SplitSettings, progress: Progress) -> SplitResult:
    """Split the photos.

    Raises:
        DataError: the photos cannot be split, or `into` holds something else.
        StorageError: no space left; nothing half-made is left behind.
    """
    split = split_folder(settings.photos, val=settings.val, test=settings.test, seed=settings.seed, progress=progress)
    report_refused(split.refused, strict=settings.strict, progress=progress)
    for name, share in (("val", settings.val), ("test", settings.test)):
        if share:
            report_missing_classes(split.photos, name, progress)
    written = write_split(split, settings.into, settings.how, progress)
    return SplitResult(split=split, into=settings.into, written=written)
