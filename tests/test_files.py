import errno
import json
import os
from pathlib import Path

import pytest

from bnlab.errors import StorageError
from bnlab.files import new_folder, read_csv, remove_drafts, write_atomic, write_csv, write_json


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_write_replaces_the_complete_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "long old content")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StorageError) as error:
        write_atomic(path, "new")
    assert f"no space left on the device to write {path}: free some" in str(error.value)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_may_not_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "fsync", denied)
    with pytest.raises(StorageError, match=r"a.txt cannot be written \(Permission denied\): pass a path"):
        write_atomic(tmp_path / "a.txt", "new")


def test_new_folder_appears_only_when_complete(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "made") as draft:
        (draft / "x").write_text("x")
        assert not (tmp_path / "deep" / "made").exists()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["made"]
    assert (tmp_path / "deep" / "made" / "x").read_text() == "x"


def test_an_empty_folder_is_filled_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be where a disk is mounted, or where the user stands."""
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    with new_folder(Path()) as draft:
        (draft / "x").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert tmp_path.stat().st_ino == before


def test_drafts_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".0123.part").write_text("half")
    (tmp_path / "whole.part").write_text("mine")
    remove_drafts(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["whole.part"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_new_folder_vanishes_on_failure(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_folder(tmp_path / "made") as draft:
        (draft / "x").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_tables_keep_odd_names(tmp_path: Path) -> None:
    names = ['with "quotes", commas', "new\nline", "carriage\rreturn", "百合", os.fsdecode(b"\xff\xfe.jpg"), " spaces "]
    write_csv(tmp_path / "t.csv", ("name", "value"), ((name, None) for name in names))
    assert [row["name"] for row in read_csv(tmp_path / "t.csv")] == names
    assert {row["value"] for row in read_csv(tmp_path / "t.csv")} == {""}


def test_json_is_written_in_order(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": [1.5]})
    assert list(json.loads((tmp_path / "a.json").read_text())) == ["b", "a"]
