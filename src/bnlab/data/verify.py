"""Whether photos are still those of a list: by size and time of the last change, and by content where these differ."""

import os
import stat
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from bnlab.data.photos import Content, Photo, Photos, Stamp
from bnlab.data.scan import Refusal, map_photos
from bnlab.errors import DataError, PhotoError, plural, printable
from bnlab.files import file_sha256
from bnlab.progress import Progress

_NAMED = 5  # most photos that a message names


def stamp_of(path: str) -> Stamp:
    """The size of a file and the time of its last change.

    Raises:
        PhotoError: there is no such file, or it is not a regular one.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 (a Path for each of a million files is slow)
    except FileNotFoundError:
        raise PhotoError(path, "there is no such file", "check the path") from None
    except OSError as error:
        raise PhotoError(path, f"it cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        raise PhotoError(path, "it is not a regular file")
    return status.st_size, status.st_mtime_ns


def read_content(path: str) -> Content:
    """The SHA-256 of a file, and its stamp from before it was read.

    Raises:
        PhotoError: the file cannot be read.
    """
    stamp = stamp_of(path)
    try:
        return Content(file_sha256(path), stamp)
    except OSError as error:
        raise PhotoError(path, f"it cannot be read ({error.strerror})") from None


def with_present_content(
    photos: Photos, read: Callable[[Photo], Content], refused: list[Refusal], progress: Progress
) -> Photos:
    """The same photos with the content that their files have now.

    Photos whose stamp is the recorded one are not read. The others are, by `read`; those at which it raises a
    PhotoError are added to `refused`, and have no SHA-256 in the result.
    """
    again = np.flatnonzero(~_is_as_recorded(photos))
    if not len(again):
        return photos
    unknown = Content("", None)
    results = map_photos(photos[again], read, refused, progress)
    known = ((int(again[i]), content) for i, content in results)
    return photos.with_content((i, unknown) for i in again.tolist()).with_content(known)


def check_unchanged(photos: Photos) -> None:
    """Refuse photos that were changed since they were read.

    Raises:
        DataError: it names the first of them.
    """
    changed = photos[~_is_as_recorded(photos)].paths
    if len(changed):
        raise DataError(
            f"{plural(len(changed), 'photo')} changed while photos were read ({first_of(changed)})",
            "begin again when nothing writes to the photos any more",
        )


def first_of(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    text = ", ".join(map(printable, names[:_NAMED]))
    return text if len(names) <= _NAMED else f"{text} and {len(names) - _NAMED} more"


def _is_as_recorded(photos: Photos) -> NDArray[np.bool_]:
    """For each photo whether its SHA-256 is known, and its file has the stamp that was recorded with it."""
    recorded, now = photos.stamps, np.full((len(photos), 2), -1, dtype=np.int64)
    for i, path in enumerate(photos.paths):
        try:
            now[i] = stamp_of(path)
        except PhotoError:
            continue
    as_recorded: NDArray[np.bool_] = (now == recorded).all(1) & (now[:, 0] >= 0) & photos.hashed
    return as_recorded
