"""Files that are either there as a whole or not at all."""

import csv
import errno
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bnlab.errors import StorageError, printable

# Undecodable bytes in file names survive a way through a text file as surrogates.
ENCODING, ERRORS = "utf-8", "surrogateescape"


def write_atomic(path: Path, content: bytes | memoryview | str) -> None:
    """Write `content` so that a reader sees the old file or the new one, never half of one.

    It is written beside the target, flushed to the disk and renamed. When that fails, the old file is untouched and
    the half-written one is gone.

    Raises:
        StorageError: no space left, no permission, a read-only disk.
    """
    data = content.encode(ENCODING, ERRORS) if isinstance(content, str) else content
    draft = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex[:8]}.part")
    with storage_errors(path):
        try:
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document atomically, indented and in the order given."""
    write_atomic(path, json.dumps(document, indent=2) + "\n")


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a table atomically, with a header line. None becomes an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def read_csv(path: Path) -> Iterator[Mapping[str, str]]:
    """The rows of a table as mappings from column to text."""
    with path.open(newline="", encoding=ENCODING, errors=ERRORS) as file:
        yield from csv.DictReader(file)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A draft folder that becomes `path` when the block ends well and vanishes when it does not.

    `path` must not exist, or be an empty folder.
    """
    draft = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.part"
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
        try:
            yield draft
            if path.exists():
                path.rmdir()
            draft.rename(path)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what a disk can do to a writer into a StorageError that names `path`."""
    try:
        yield
    except OSError as error:
        name = printable(path)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"no space left on the device to write {name}", "free some; what was there before is untouched"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise StorageError(
                f"{name} cannot be written ({error.strerror})", "choose a folder you may write to"
            ) from error
        raise


def first_free(folder: Path, name: str, taken: Callable[[Path], bool] = Path.exists) -> Path:
    """`folder/name`, or `folder/name2`, `name3`, ...: the first that is not taken."""
    number = 1
    while taken(path := folder / (name if number == 1 else f"{name}{number}")):
        number += 1
    return path
