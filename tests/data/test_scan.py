import os
from pathlib import Path

import pytest

from bnlab.data.photos import Photo
from bnlab.data.scan import (
    Refusal,
    check_classes,
    map_photos,
    photos_below,
    report_ignored_files,
    report_refused,
    report_system_folders,
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
        tmp_path,
        "b/2.JPG",
        "b/1.png",
        "b/3.mpo",
        "a/deep/er/x.jpeg",
        "a/notes.txt",
        "a/.hidden.jpg",
        ".git/x.jpg",
        "a/.x/y.jpg",
    )
    found = [(os.path.relpath(file.path, tmp_path), file.label) for file in scan(tmp_path, [])]
    assert found == [("a/deep/er/x.jpeg", "a"), ("b/1.png", "b"), ("b/2.JPG", "b"), ("b/3.mpo", "b")]


def test_links_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path / "far", "x.jpg")
    touch(tmp_path / "photos", "a/1.jpg")
    (tmp_path / "photos" / "b").symlink_to(tmp_path / "far")
    (tmp_path / "photos" / "a" / "up").symlink_to(tmp_path / "photos" / "a")
    assert [(Path(file.path).name, file.label) for file in scan(tmp_path / "photos", [])] == [
        ("1.jpg", "a"),
        ("x.jpg", "b"),
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("x.txt",), "has neither sub-folders nor photos"),
        (("x.jpg",), "has photos but no sub-folders"),
        (("a/x.txt", "b/x.txt"), r"has no class with photos; left out: a \(no photos\), b \(no photos\): add"),
        (("__MACOSX/a/x.jpg", "x.jpg"), r"no class with photos; left out: __MACOSX \(a folder of the system\)"),
    ],
)
def test_a_folder_without_classes_or_photos_is_refused(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        scan(touch(tmp_path, *names), [])


def test_folders_that_cannot_be_read_are_listed(tmp_path: Path, locked: str) -> None:
    touch(tmp_path, "a/1.jpg", f"a/deep/{locked}/2.jpg", f"b/{locked}/3.jpg", "b/4.jpg", f"{locked}/5.jpg")
    refused: list[Refusal] = []
    assert [os.path.relpath(photo.path, tmp_path) for photo in scan(tmp_path, refused)] == ["a/1.jpg", "b/4.jpg"]
    reason = "it cannot be read (Permission denied)"
    expected = [(f"a/deep/{locked}", "a"), (f"b/{locked}", "b"), (locked, locked)]
    assert refused == [Refusal(str(tmp_path / path), reason, label, is_folder=True) for path, label in expected]
    progress = NullProgress()
    report_ignored_files(tmp_path, progress)
    assert progress.warnings == [f"left out 1 folder without photos: {tmp_path / locked}"]


def test_links_that_lead_nowhere_are_listed(tmp_path: Path) -> None:
    """Whether a link was to a folder or to a file is not known; one with the name of a photo counts as a photo."""
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "c").symlink_to(tmp_path / "unplugged")
    (tmp_path / "d").symlink_to(tmp_path / "d")
    (tmp_path / "a" / "deep").symlink_to(tmp_path / "unplugged")
    for link in ("gone.jpg", "loop.jpg"):
        (tmp_path / "b" / link).symlink_to(tmp_path / "b" / link if link == "loop.jpg" else tmp_path / "unplugged")
    refused: list[Refusal] = []
    names = [Path(photo.path).name for photo in scan(tmp_path, refused)]
    assert names == ["1.jpg", "2.jpg", "gone.jpg", "loop.jpg"]
    assert [(os.path.relpath(link.path, tmp_path), link.label) for link in refused] == [
        ("c", ""), ("d", ""), ("a/deep", "a"),
    ]  # fmt: skip
    assert "No such file" in refused[0].reason
    assert "symbolic links" in refused[1].reason
    report_ignored_files(tmp_path, NullProgress())


def test_folders_that_lie_too_deep_for_the_system_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/1.jpg")
    monkeypatch.chdir(tmp_path / "a")
    for _ in range(20):
        Path("d" * 250).mkdir()
        os.chdir("d" * 250)
    refused: list[Refusal] = []
    assert len(scan(tmp_path, refused)) == 1
    assert [each.reason for each in refused] == ["it cannot be read (File name too long)"]


@pytest.mark.parametrize("system", ["__MACOSX", "@eaDir", "$Recycle.Bin", "lost+found"])
def test_folders_of_the_system_are_no_classes_and_hold_no_photos(tmp_path: Path, system: str) -> None:
    touch(tmp_path, "a/1.jpg", f"a/deep/{system}/2.jpg", "b/3.jpg", f"{system}/a/4.jpg")
    assert [Path(photo.path).name for photo in scan(tmp_path, [])] == ["1.jpg", "3.jpg"]
    inside = f"{tmp_path / 'a' / 'deep' / system}"
    progress = NullProgress()
    report_ignored_files(tmp_path, progress)
    assert progress.warnings == [f"left out 2 folders of the system: {tmp_path / system}, {inside}"]
    progress = NullProgress()
    report_system_folders(tmp_path / "a", progress)
    assert progress.warnings == [f"left out 1 folder of the system: {inside}"]


def test_folders_without_photos_are_left_out_with_a_warning(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/2.jpg", "void/x.txt", *(f"void{number}/deep/x.txt" for number in range(6)))
    assert {photo.label for photo in scan(tmp_path, [])} == {"a", "b"}
    progress = NullProgress()
    report_ignored_files(tmp_path, progress)
    (warning,) = progress.warnings
    assert warning.startswith(f"left out 7 folders without photos: {tmp_path}/void, {tmp_path}/void0, ")
    assert warning.endswith(" and 2 more")


def test_fewer_than_two_classes_are_refused_and_what_was_left_out_is_named(tmp_path: Path, locked: str) -> None:
    touch(tmp_path, "a/1.jpg", "b/x.txt", f"{locked}/2.jpg", "@eaDir/3.jpg", f"c/{locked}/4.jpg")
    (tmp_path / "gone").symlink_to(tmp_path / "unplugged")
    check_classes(["a", "b"], "flowers", tmp_path)
    with pytest.raises(DataError) as error:
        check_classes(["a"], "flowers", tmp_path)
    for left_out in (
        "flowers has only one class, 'a'; left out: @eaDir (a folder of the system), gone (it cannot be read (No such",
        "b (no photos), c (it cannot be read (Permission denied)), locked (it cannot be read (Permission denied)): a",
    ):
        assert left_out in str(error.value)
    with pytest.raises(DataError, match="flowers has no classes: "):
        check_classes([], "flowers", tmp_path / "none")


def test_a_missing_folder_and_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"no folder {tmp_path / 'none'}"):
        scan(tmp_path / "none", [])
    touch(tmp_path, "file")
    with pytest.raises(DataError, match="file cannot be read"):
        scan(tmp_path / "file", [])


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
    with pytest.raises(DataError, match=r"7 photos .*0.jpg, broken.*leave strict out"):
        report_refused(refused, strict=True, progress=progress)
    report_refused([], strict=True, progress=progress)


def test_photos_and_folders_are_counted_apart() -> None:
    refused = [Refusal("1.jpg", "broken"), *(Refusal(f"{n}", "it cannot be read", is_folder=True) for n in range(6))]
    progress = NullProgress()
    report_refused(refused, strict=False, progress=progress)
    assert progress.warnings[-1] == "and 2 more folders that cannot be used"
    with pytest.raises(DataError, match="1 photo and 6 folders cannot be used"):
        report_refused(refused, strict=True, progress=progress)


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
    assert [Path(p).name for p in photos_below(tmp_path, [])] == ["b.webp", "c.tiff"]
