"""Files that are written completely or not at all."""

import codecs
import csv
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from bnlab.errors import StorageError, printable

# With this error handler, undecodable bytes in file names survive a round trip through a text file.
ERRORS = "surrogateescape"


def write_atomic(path: Path, content: bytes | memoryview | str) -> None:
    """Write `content` so that a reader sees the old file or the new one, never half of one.

    It is written next to the target, flushed to the disk and renamed. If that fails, the old file is untouched and
    the draft is removed; if the process is killed, the draft stays as `.NAME.part`, for `remove_drafts`.

    Raises:
        StorageError: no space left, no permission, a read-only disk.
    """
    with _written(path) as file:
        file.write(content.encode("utf-8", ERRORS) if isinstance(content, str) else content)


def write_json(path: Path, document: Any) -> None:
    write_atomic(path, json.dumps(document, indent=2) + "\n")


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a table atomically, row by row, with a header line. None becomes an empty cell."""
    with _written(path) as file:
        text = codecs.getwriter("utf-8")(file, ERRORS)
        plain = csv.writer(text, lineterminator="\n")
        quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
        for cells in chain([columns], rows):
            row = list(cells)
            # The csv module leaves a lone carriage return unquoted, and then reads it as the end of the row.
            odd = any("\r" in cell for cell in row if isinstance(cell, str))
            (quoted if odd else plain).writerow(row)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if the file is missing or damaged."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def read_csv(path: Path) -> Iterator[Mapping[str, str]]:
    """The rows of a CSV file as mappings from column to text.

    Raises:
        OSError, UnicodeError, csv.Error: the file cannot be read as CSV.
    """
    with path.open(newline="", encoding="utf-8-sig", errors=ERRORS) as file:
        yield from csv.DictReader(file)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A draft folder that becomes `path` if the block succeeds and is removed if it fails.

    `path` must not exist, or be an empty folder (which is kept, because a disk may be mounted there).

    Raises:
        StorageError: the folder cannot be made.
    """
    path = path.absolute()
    inside = path.is_dir()
    draft = _draft_of(path / "x" if inside else path)
    with storage_errors(path):
        draft.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
    try:
        yield draft
        with storage_errors(path):
            if inside:
                for child in sorted(draft.iterdir()):
                    child.rename(path / child.name)
                draft.rmdir()
            else:
                draft.rename(path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def remove_drafts(folder: Path) -> None:
    """Remove the drafts of a killed process from a folder that no other process writes to."""
    for draft in folder.glob(".*.part"):
        with suppress(OSError):
            draft.unlink()


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of writing into a StorageError that names `path`."""
    try:
        yield
    except OSError as error:
        name = printable(path)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"no space left on the device to write {name}", "free some; earlier files are untouched"
            ) from error
        reason = error.strerror or error
        raise StorageError(f"{name} cannot be written ({reason})", "pass a path that you may write to") from error


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """A draft file that replaces `path` if the block succeeds and is removed if it fails."""
    draft = _draft_of(path)
    with storage_errors(path):
        try:
            with draft.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise


def _draft_of(path: Path) -> Path:
    return path.with_name(f".{uuid.uuid4().hex[:12]}.part")
