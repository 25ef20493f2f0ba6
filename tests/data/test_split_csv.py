from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnlab.data.photos import Photo
from bnlab.data.split import split_folder
from bnlab.data.split_csv import _within, as_label, read_split_csv, report_missing_classes, write_split_csv
from bnlab.errors import DataError
from bnlab.progress import NullProgress


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,class\na.jpg,a\n", "is no split.csv: it needs the columns path, class, split, sha256"),
        ("\x89PNG\n\0\n", "is no split.csv: it needs the columns path, class, split, sha256"),
        ("path,class,split\na.jpg,,val\n", "has no 'class' in row 2: fill it in"),
        ("path,class,split\n" + "x" * 200_000 + ",a,val\n", "cannot be read (field larger than field limit (131072))"),
        ("path,class,split,sha256\na.jpg,a,dev,0\n", "has the split 'dev' in row 2: say train, val, test"),
        ("path,class,split,sha256\n", "lists no photos: it needs the columns"),
    ],
)
def test_a_list_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "split.csv").write_text(text)
    with pytest.raises(DataError) as error:
        read_split_csv(tmp_path / "split.csv")
    assert message in str(error.value)


def test_lists_are_read_from_anywhere(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_split_csv(
        tmp_path / "list.csv", split_folder(Path("photos"), val=0.3, test=0, seed=0, progress=NullProgress()).photos
    )
    monkeypatch.chdir("/")
    assert all(Path(p.path).is_file() for p in read_split_csv(tmp_path / "list.csv"))


def test_a_list_from_a_spreadsheet_is_read(tmp_path: Path) -> None:
    """With a byte order mark, other columns, and no hashes."""
    (tmp_path / "split.csv").write_text("\ufeffpath,class,split,note\r\na.jpg,rose,val,x\r\n", "utf-8")
    assert list(read_split_csv(tmp_path / "split.csv")) == [Photo(str(tmp_path / "a.jpg"), "rose", "val", "")]


def test_a_class_has_one_name_on_every_system(tmp_path: Path) -> None:
    assert as_label("cafe\u0301") == as_label("caf\u00e9") == "caf\u00e9"


def test_a_class_that_a_side_lacks_is_told() -> None:
    progress = NullProgress()
    report_missing_classes(
        [Photo("1", "a", "train", ""), Photo("2", "a", "val", ""), Photo("3", "b", "train", "")], "val", progress
    )
    assert progress.warnings == [
        "val has no photo of class 'b', so how well it is known will not be measured: "
        "hold out more or take another --seed"
    ]


@given(st.sampled_from(["", ".", "/", "//", "a", "/a/b", "..", "a/.."]), st.text("a./", max_size=8))
def test_paths_are_joined_as_pathlib_does(folder: str, path: str) -> None:
    assert _within(Path(folder), path) == str(Path(folder) / path)
