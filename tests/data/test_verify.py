import os
import shutil
from pathlib import Path

import pytest

from bnlab.data.photos import Photo, Photos
from bnlab.data.scan import Refusal
from bnlab.data.verify import check_unchanged, first_of, read_content, stamp_of, with_present_content
from bnlab.errors import DataError, PhotoError
from bnlab.progress import NullProgress


@pytest.fixture
def listed(tmp_path: Path) -> Photos:
    """Four files with their content."""
    paths = [tmp_path / f"{n}.jpg" for n in range(4)]
    for path in paths:
        path.write_text(path.name)
    return Photos.of(Photo(str(path), "a", "train", *read_content(str(path))) for path in paths)


def test_only_files_that_changed_or_have_no_stamp_are_read(listed: Photos) -> None:
    paths, read = list(listed.paths), []

    def reading(photo: Photo) -> object:
        read.append(photo.path)
        return read_content(photo.path)

    now = with_present_content(listed, reading, [], NullProgress())  # type: ignore[arg-type]
    assert (read, list(now)) == ([], list(listed))
    Path(paths[1]).write_text("another")
    os.utime(paths[2], ns=(1, 1))
    older = Photos.of(
        Photo(p.path, p.label, p.split, p.sha256, p.stamp if p.path != paths[3] else None) for p in listed
    )
    now = with_present_content(older, reading, [], NullProgress())  # type: ignore[arg-type]
    assert sorted(read) == paths[1:]
    assert now.same_content(older).tolist() == [True, False, True, True]
    assert [photo.stamp for photo in now] == [stamp_of(path) for path in paths]


def test_a_photo_of_the_same_size_is_read(listed: Photos) -> None:
    Path(listed.paths[0]).write_text("x.jpg")
    os.utime(listed.paths[0], ns=(1, 1))
    now = with_present_content(listed, lambda photo: read_content(photo.path), [], NullProgress())
    assert now.same_content(listed).tolist() == [False, True, True, True]


def test_photos_that_are_gone_are_refused_and_have_no_content(listed: Photos) -> None:
    refused: list[Refusal] = []
    Path(listed.paths[0]).unlink()
    Path(listed.paths[1]).unlink()
    os.mkfifo(listed.paths[1])  # to read it would wait for ever
    now = with_present_content(listed, lambda photo: read_content(photo.path), refused, NullProgress())
    assert now.hashed.tolist() == [False, False, True, True]
    assert [refusal.reason for refusal in refused] == ["there is no such file", "it is not a regular file"]
    with pytest.raises(PhotoError, match=r"it cannot be read \(Not a directory"):
        stamp_of(f"{listed.paths[2]}/x")


def test_a_photo_that_changes_while_it_is_read_has_the_stamp_from_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the old SHA-256 would stand beside the new time, and nothing would ever show it."""
    path = tmp_path / "a.jpg"
    path.write_text("before")

    def replaced(name: str) -> str:
        shutil.copy(__file__, name)
        return "ab" * 32

    monkeypatch.setattr("bnlab.data.verify.file_sha256", replaced)
    before = stamp_of(str(path))
    assert read_content(str(path)).stamp == before != stamp_of(str(path))
    with pytest.raises(DataError, match=r"1 photo changed while photos were read \(.*a\.jpg\): begin again"):
        photo = Photo(str(path), "a", "train", "ab" * 32, before)
        check_unchanged(Photos.of([photo]))


def test_five_names_are_given() -> None:
    assert first_of(["a", "b\n"]) == r"a, b\n"
    assert first_of(list("abcdefg")) == "a, b, c, d, e and 2 more"
