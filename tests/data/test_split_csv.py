import os
import tempfile
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnlab.data import split_csv as module
from bnlab.data.photos import Photo
from bnlab.data.split_csv import (
    as_label,
    count_photos,
    read_split_csv,
    report_missing_classes,
    write_split_csv,
)
from bnlab.errors import DataError
from bnlab.progress import NullProgress
from tests.data.test_photos import FOUR, PHOTOS

NAMES = st.text(",\"'\n\r; \té百\U0001f33c/", min_size=1, max_size=8) | st.binary(min_size=1, max_size=8).map(
    os.fsdecode
)


@given(PHOTOS, st.lists(NAMES, min_size=12, max_size=12))
@settings(max_examples=40)
def test_a_list_is_read_as_it_was_written(photos: list[Photo], names: list[str]) -> None:
    photos = [Photo(f"/{name.strip('/')}x", p.label, p.split, p.sha256) for name, p in zip(names, photos, strict=False)]
    photos = [photo for photo in photos if photo.path == str(Path(photo.path))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "split.csv")
        write_split_csv(path, [*FOUR, *photos], absolute=False)
        assert list(read_split_csv(path))[len(FOUR) :] == photos


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,class\na.jpg,a\n", "is not a split.csv: .*path, class, split, sha256"),
        ("\x89PNG\n\0\n", "is not a split.csv"),
        ("path,class,split\na.jpg,,val\n", "no 'class' in row 2"),
        ("path,class,split\n" + "x" * 200_000 + ",a,val\n", "cannot be read .*131072"),
        ("path,class,split,sha256\na.jpg,a,dev,0\n", "split 'dev' in row 2: .*train, val, test"),
        ("path,class,split,sha256\n", "lists no photos"),
    ],
)
def test_a_file_that_is_not_a_list_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "split.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_split_csv(tmp_path / "split.csv")


def test_absolute_paths_are_valid_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_split_csv(tmp_path / "list.csv", [Photo("photos/1.png", "a", "val", "")])
    assert read_split_csv(tmp_path / "list.csv")[0].path == str(tmp_path / "photos" / "1.png")


def test_a_list_from_a_spreadsheet_is_read(tmp_path: Path) -> None:
    """With a byte order mark, other columns, and no hashes."""
    (tmp_path / "split.csv").write_text("\ufeffpath,class,split,note\r\na.jpg,rose,val,x\r\n", "utf-8")
    assert list(read_split_csv(tmp_path / "split.csv")) == [Photo(str(tmp_path / "a.jpg"), "rose", "val", "")]


def test_a_class_has_one_name_on_every_system() -> None:
    assert as_label("cafe\u0301") == as_label("caf\u00e9") == "caf\u00e9"


def test_photos_are_counted_by_class_and_split() -> None:
    assert count_photos(FOUR) == {
        "lily": {"train": 1, "val": 1, "test": 0},
        "rose": {"train": 1, "val": 1, "test": 0},
    }


def test_a_class_that_is_missing_in_a_split_is_reported() -> None:
    progress = NullProgress()
    photos = [Photo("1", "a", "train", ""), Photo("2", "a", "val", ""), Photo("3", "b", "train", "")]
    report_missing_classes(photos, "val", progress)
    (warning,) = progress.warnings
    assert "val has no photo of class 'b' (1 in train)" in warning


@pytest.mark.parametrize("folder", ["", ".", "/", "//", "a", "/a/b", "..", "a/.."])
def test_paths_are_joined_as_pathlib_does(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    paths = ["".join(letters) for length in range(1, 6) for letters in product("a./", repeat=length)]
    rows = [{"path": path, "class": "a", "split": "val"} for path in paths]
    monkeypatch.setattr(module, "read_csv", lambda _: iter(rows))
    assert list(read_split_csv(Path(folder, "split.csv")).paths) == [str(Path(folder) / path) for path in paths]
