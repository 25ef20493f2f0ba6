"""Where the photos of a run lie: where its split.csv says, or at the same place as before relative to the run folder.

The paths in split.csv are absolute. data.json, next to it, has the folder below which they lie, and the way to that
folder from the run's. So a project that is moved as a whole still finds its photos.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bnlab.data.photos import Photos
from bnlab.errors import DataError, printable
from bnlab.files import read_json, write_json

DATA_JSON = "data.json"


@dataclass(frozen=True)
class Place:
    """A folder below which all photos of a list lie."""

    listed: str  # the folder in the paths of split.csv
    now: str  # the folder where the photos are

    def of(self, photos: Photos) -> Photos:
        """The photos of split.csv, with the paths that they have here."""
        return photos if self.now == self.listed else photos.moved(self.listed, self.now)

    def record(self, run: Path) -> None:
        """Write data.json into the folder of a run.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            from_run = os.path.relpath(self.now, run.absolute())
        except ValueError:  # Windows: another drive
            from_run = self.now
        write_json(run / DATA_JSON, {"root": self.listed, "from_run": from_run})


def root_of(photos: Photos, data: Path) -> str:
    """The folder of DATA, or, if photos of it lie elsewhere, the deepest folder that holds them all."""
    folders = [os.path.abspath(folder) for folder in photos.folders]  # noqa: PTH100 (symbolic links are kept)
    given = os.path.abspath(data if data.is_dir() else data.parent)  # noqa: PTH100
    try:
        common = os.path.commonpath(folders)
        return given if os.path.commonpath([common, given]) == given else common
    except ValueError:  # Windows: several drives
        return given


def places(split_csv: Path, photos: Photos) -> Iterator[Place]:
    """Where the photos of a run's split.csv may lie: at their paths, then at the same place relative to the run."""
    document = read_json(split_csv.with_name(DATA_JSON))
    listed, from_run = document.get("root"), document.get("from_run")
    if not isinstance(listed, str) or not isinstance(from_run, str):
        listed = root_of(photos, split_csv)
        yield Place(listed, listed)
        return
    yield Place(listed, listed)
    now = os.path.normpath(split_csv.parent.absolute() / from_run)
    if now != listed:
        yield Place(listed, now)


def where_they_are(split_csv: Path, photos: Photos) -> Photos:
    """The photos of a list, with their paths at the first place where none is missing, or else the fewest are.

    Raises:
        DataError: they lie at none of several places.
    """
    known = list(places(split_csv, photos))
    if len(known) == 1:
        return photos
    best, fewest = photos, len(photos)
    for place in known:
        here = place.of(photos)
        missing = sum(not os.path.isfile(path) for path in here.paths)  # noqa: PTH113 (a Path for each is slow)
        if missing < fewest:
            best, fewest = here, missing
        if not missing:
            break
    if fewest == len(photos):
        tried = " nor in ".join(printable(place.now) for place in known)
        raise DataError(
            f"the photos of {printable(split_csv)} are neither in {tried}",
            "move them to one of these, or pass their own folder as DATA",
        )
    return best
