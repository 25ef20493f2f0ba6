import os
from pathlib import Path

import pytest

from bnlab.data.photos import Photo
from bnlab.data.scan import (
    Refusal,
    map_photos,
    photos_below,
    report_ignored_files,
    report_refused,
    scan,
    split_folders,
)
from bnlab.errors import DataError, PhotoError
from bnlab.progress import NullProgress
from tests.conftest import Notes


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    touch(
        tmp_path, "b/2.JPG", "b/1.png", "a/deep/er/x.jpeg", "a/notes.txt", "a/.hidden.jpg", ".git/x.jpg", "a/.x/y.jpg"
    )
    found = [(os.path.relpath(file.path, tmp_path), file.label) for file in scan(tmp_path)]
    assert found == [("a/deep/er/x.jpeg", "a"), ("b/1.png", "b"), ("b/2.JPG", "b")]


def test_links_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path / "far", "x.jpg")
    touch(tmp_path / "photos", "a/1.jpg")
    (tmp_path / "photos" / "b").symlink_to(tmp_path / "far")
    (tmp_path / "photos" / "a" / "up").symlink_to(tmp_path / "photos" / "a")
    assert [(Path(file.path).name, file.label) for file in scan(tmp_path / "photos")] == [
        ("1.jpg", "a"),
        ("x.jpg", "b"),
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("x.txt",), "has neither sub-folders nor photos"),
        (("x.jpg",), "has photos but no sub-folders"),
        (("a/x.jpg", "b/x.txt"), "class 'b' has no photos in"),
    ],
)
def test_a_folder_without_classes_or_photos_is_refused(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        scan(touch(tmp_path, *names))


def test_a_missing_folder_and_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"no folder {tmp_path / 'none'}"):
        scan(tmp_path / "none")
    touch(tmp_path, "file")
    with pytest.raises(DataError, match="file cannot be read"):
        scan(tmp_path / "file")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("train/a/1.jpg", "Validation/a/2.jpg"), ["val", "train"]),
        (("train/a/1.jpg",), ["train"]),
        (("train/1.jpg", "val/2.jpg"), []),  # two classes
        (("train/a/1.jpg", "car/2.jpg"), []),  # a class with a sub-folder
        (("val/a/1.jpg", "test/a/2.jpg"), []),
    ],
)
def test_a_split_folder_is_told_from_classes_called_train(
    tmp_path: Path, names: tuple[str, ...], expected: list[str]
) -> None:
    assert [split for split, _ in split_folders(touch(tmp_path, *names))] == expected


def test_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "val/a/2.jpg", "valid/a/3.jpg")
    with pytest.raises(DataError, match=r"two val folders.*valid"):
        split_folders(tmp_path)


def test_map_photos_keeps_the_order_and_lists_refusals() -> None:
    photos = [Photo(f"{i:03}.jpg", "a") for i in range(300)]
    refused: list[Refusal] = []

    def read(photo: Photo) -> str:
        path = photo.path
        if path.endswith("7.jpg"):
            raise PhotoError(path, "seven")
        return Path(path).stem

    results = list(map_photos(photos, read, refused, NullProgress()))
    assert results == [(i, f"{i:03}") for i in range(300) if i % 10 != 7]
    assert refused == [Refusal(f"{i:03}.jpg", "seven", "a") for i in range(7, 300, 10)]


def test_refused_photos_are_named_and_counted() -> None:
    refused = [Refusal(f"{i}.jpg", "broken") for i in range(7)]
    progress = NullProgress()
    report_refused(refused, strict=False, progress=progress)
    assert ["broken" in warning for warning in progress.warnings] == [True] * 5 + [False]
    assert all(f"{i}.jpg" in warning for i, warning in enumerate(progress.warnings[:5]))
    assert "2 more photos" in progress.warnings[5]
    with pytest.raises(DataError, match=r"7 photos .*0.jpg, broken.*--strict"):
        report_refused(refused, strict=True, progress=progress)
    report_refused([], strict=True, progress=progress)


def test_ignored_files_are_reported(tmp_path: Path) -> None:
    touch(tmp_path, "loose.jpg", "a/1.jpg", "a/deep/2.jpg", "a/x.txt", "a/y.txt", "a/README", "b/3.jpg")
    progress = Notes()
    report_ignored_files(tmp_path, progress)
    loose, nested = progress.warnings
    assert "1 photo" in loose
    assert "class 'a'" in nested
    assert "deep" in nested
    (note,) = progress.notes
    assert "2 with .txt" in note
    assert "1 with no suffix" in note


def test_only_photos_are_found(tmp_path: Path) -> None:
    touch(tmp_path, "a.svg", "b.webp", "c.tiff", "d")
    assert [Path(p).name for p in photos_below(tmp_path)] == ["b.webp", "c.tiff"]
