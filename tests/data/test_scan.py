import os
from pathlib import Path

import pytest

from bnlab.data.scan import Refusal, map_usable_photos, photos_below, report_refused, scan
from bnlab.errors import DataError, PhotoError
from bnlab.progress import NullProgress


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    touch(
        tmp_path, "b/2.JPG", "b/1.png", "a/deep/er/x.jpeg", "a/notes.txt", "a/.hidden.jpg", ".git/x.jpg", "a/.x/y.jpg"
    )
    found = [(os.path.relpath(one.path, tmp_path), one.label) for one in scan(tmp_path)]
    assert found == [("a/deep/er/x.jpeg", "a"), ("b/1.png", "b"), ("b/2.JPG", "b")]


def test_links_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path / "far", "x.jpg")
    touch(tmp_path / "photos", "a/1.jpg")
    (tmp_path / "photos" / "b").symlink_to(tmp_path / "far")
    (tmp_path / "photos" / "a" / "up").symlink_to(tmp_path / "photos" / "a")
    assert [(Path(one.path).name, one.label) for one in scan(tmp_path / "photos")] == [("1.jpg", "a"), ("x.jpg", "b")]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("x.txt",), "has neither sub-folders nor photos: put the photos of each class into a sub-folder of its name"),
        (("x.jpg",), "has photos but no sub-folders: put the photos of each class into a sub-folder of its name"),
        (("a/x.jpg", "b/x.txt"), "class 'b' has no photos in "),
    ],
)
def test_what_is_no_folder_of_classes(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError) as error:
        scan(touch(tmp_path, *names))
    assert message in str(error.value)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"there is no folder {tmp_path / 'none'}: check the path"):
        scan(tmp_path / "none")
    touch(tmp_path, "file")
    with pytest.raises(DataError, match="cannot be read"):
        scan(tmp_path / "file")


def test_examine_keeps_order_and_refusals(tmp_path: Path) -> None:
    found = scan(touch(tmp_path, *(f"a/{i:03}.jpg" for i in range(300))))

    def look(path: str) -> str:
        if path.endswith("7.jpg"):
            raise PhotoError(path, "seven")
        return Path(path).stem

    good, refused = map_usable_photos(found, look, title="", total=300, progress=NullProgress())
    assert [value for _, value in good] == [f"{i:03}" for i in range(300) if i % 10 != 7]
    assert len(refused) == 30
    assert refused[0] == Refusal(found[7].path, "seven", "a")


def test_refused_photos_are_named_and_counted() -> None:
    refused = [Refusal(f"{i}.jpg", "broken") for i in range(7)]
    progress = NullProgress()
    report_refused(refused, strict=False, progress=progress)
    assert progress.warnings == [
        *(f"left out {i}.jpg: broken" for i in range(5)),
        "and 2 more photos that cannot be used",
    ]
    with pytest.raises(DataError) as error:
        report_refused(refused, strict=True, progress=progress)
    assert str(error.value) == ("7 photos cannot be used (the first: 0.jpg, broken): mend them or leave --strict out")
    report_refused([], strict=True, progress=progress)


def test_only_photos_are_found(tmp_path: Path) -> None:
    touch(tmp_path, "a.svg", "b.webp", "c.tiff", "d")
    assert [Path(p).name for p in photos_below(tmp_path)] == ["b.webp", "c.tiff"]
