"""`bnlab split`: split a folder of classes into train, val and test."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnlab.data.duplicates import Group
from bnlab.data.scan import Result, report_refused
from bnlab.data.split import Split, split_folder, write_split
from bnlab.data.split_csv import report_missing_classes
from bnlab.options import SplitOptions
from bnlab.progress import LoggedProgress, Progress


@dataclass(frozen=True, kw_only=True)
class SplitResult(Result):
    """The split, its folder, and whether this call wrote it (or it was there already)."""

    split: Split
    into: Path
    written: bool

    def to_json(self) -> dict[str, Any]:
        photos = self.split.photos

        def group(found: Group) -> dict[str, Any]:
            members = [photos[i] for i in found.members]
            listed = [{"path": photo.path, "class": photo.label, "split": photo.split} for photo in members]
            return {"exact": found.exact, "photos": listed}

        return {
            "into": str(self.into),
            "written": self.written,
            "counts": self.split.counts(),
            "refused": [{"path": refusal.path, "reason": refusal.reason} for refusal in self.split.refused],
            "duplicates": [group(found) for found in self.split.groups],
            "label_conflicts": [group(found) for found in self.split.conflicts],
        }


def run(options: SplitOptions, progress: Progress) -> SplitResult:
    """Split the photos, and write the split unless it is there already."""
    progress = LoggedProgress(progress)
    split = split_folder(options.photos, val=options.val, test=options.test, seed=options.seed, progress=progress)
    report_refused(split.refused, strict=options.strict, progress=progress)
    for name, fraction in (("val", options.val), ("test", options.test)):
        if fraction:
            report_missing_classes(split.photos, name, progress)
    written = write_split(split, options.into, options.how, progress)
    return SplitResult(
        split=split, into=options.into, written=written, warnings=tuple(progress.warnings), refused=tuple(split.refused)
    )
