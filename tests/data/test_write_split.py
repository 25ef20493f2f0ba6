import hashlib
import os
import shutil
from pathlib import Path

import pytest

from bnlab.data.split_csv import read_split_csv
from bnlab.data.write_split import LinkMode, write_split
from bnlab.errors import DataError, StorageError
from bnlab.files import read_csv
from bnlab.progress import NullProgress
from tests.conftest import picture, write_photos
from tests.data.test_split import split_of


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The content and the modification time of each file."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def test_a_split_folder_holds_every_photo_once(photos: Path, tmp_path: Path) -> None:
    split = split_of(photos, val=0.3, test=0.2)
    assert write_split(split, tmp_path / "data", "link", NullProgress())
    rows = list(read_csv(tmp_path / "data" / "split.csv"))
    assert list(rows[0]) == ["path", "class", "split", "sha256"]
    assert len(rows) == 36
    for row in rows:
        path = tmp_path / "data" / row["path"]
        original = photos / row["class"] / path.name
        assert path.parts[-3:-1] == (row["split"], row["class"])
        assert path.samefile(original)
        assert row["sha256"] == hashlib.sha256(original.read_bytes()).hexdigest()
    assert {row["split"] for row in rows} == {"train", "val", "test"}
    assert split.counts()["disc"] == {
        s: sum(r["split"] == s and r["class"] == "disc" for r in rows) for s in ("train", "val", "test")
    }


def test_copies_are_copies_and_links_fall_back_to_them(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = split_of(photos)
    write_split(split, tmp_path / "copies", "copy", NullProgress())

    def no_links(*_: object) -> None:
        raise OSError("this file system has no hard links")

    monkeypatch.setattr(os, "link", no_links)
    write_split(split, tmp_path / "fallen", "link", NullProgress())
    for name in ("copies", "fallen"):
        row = read_split_csv(tmp_path / name / "split.csv")[0]
        assert not Path(row.path).samefile(split.photos[0].path)
        assert Path(row.path).read_bytes() == Path(split.photos[0].path).read_bytes()


def test_list_mode_writes_split_csv_alone(photos: Path, tmp_path: Path) -> None:
    split = split_of(photos)
    write_split(split, tmp_path / "data", "list", NullProgress())
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["split.csv"]
    assert list(read_split_csv(tmp_path / "data" / "split.csv")) == split.photos


@pytest.mark.parametrize("mode", ["link", "copy", "list"])
def test_writing_the_same_split_again_changes_nothing(photos: Path, tmp_path: Path, mode: LinkMode) -> None:
    assert write_split(split_of(photos), tmp_path / "data", mode, NullProgress())
    before = tree(tmp_path)
    assert not write_split(split_of(photos), tmp_path / "data", mode, NullProgress())
    assert tree(tmp_path) == before


def test_another_split_is_never_written_over(photos: Path, tmp_path: Path) -> None:
    write_split(split_of(photos), tmp_path / "data", "link", NullProgress())
    before = tree(tmp_path)
    with pytest.raises(DataError, match=r"data holds another split .*--into"):
        write_split(split_of(photos, seed=1), tmp_path / "data", "link", NullProgress())
    with pytest.raises(DataError, match="links, not copies"):
        write_split(split_of(photos), tmp_path / "data", "copy", NullProgress())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="mine exists and is not a split"):
        write_split(split_of(photos), tmp_path / "mine", "link", NullProgress())
    after = tree(tmp_path)
    assert after.pop("mine/thesis.txt")[0] == b"years of work"
    assert after == before


def test_photos_are_never_written_to(photos: Path) -> None:
    split, before = split_of(photos), tree(photos)
    for into in (photos, photos / "data", photos / "disc"):
        with pytest.raises(DataError, match=r"never written to: .*--into"):
            write_split(split, into, "link", NullProgress())
    with pytest.raises(DataError, match=r"contains .* itself: .*--into"):
        write_split(split, photos.parent, "link", NullProgress())
    assert tree(photos) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_split_that_fails_leaves_nothing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    split = split_of(photos)
    real, calls = shutil.copy2, 0

    def failing(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls > 10:
            raise error
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(shutil, "copy2", failing)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else StorageError):
        write_split(split, tmp_path / "data", "copy", NullProgress())
    assert calls == 11
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


def test_odd_names_survive(tmp_path: Path) -> None:
    odd = [
        "a \"b\" 'c'.png",
        "new\nline.png",
        "百合 花.png",
        " lead.png",
        "comma, semi; $.png",
        "-dash.png",
        "a\rb.png",
    ]
    photos = write_photos(tmp_path / "photos", each=6)
    for number, name in enumerate(odd):
        picture("disc", 50 + number).save(photos / "disc" / name)
    write_split(split_of(photos), tmp_path / "data", "copy", NullProgress())
    listed = read_split_csv(tmp_path / "data" / "split.csv")
    assert {Path(p.path).name for p in listed} >= set(odd)
    assert all(Path(p.path).is_file() for p in listed)


def test_duplicates_and_conflicts_are_named(photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "disc" / "disc000.png", photos / "disc" / "again.png")
    shutil.copy(photos / "ring" / "ring000.png", photos / "stripes" / "wrong.png")
    split = split_of(photos)
    assert [len(group.members) for group in split.groups] == [2, 2]
    (conflict,) = split.conflicts
    members = [split.photos[i] for i in conflict.members]
    assert {(Path(p.path).name, p.label) for p in members} == {("ring000.png", "ring"), ("wrong.png", "stripes")}
    for group in split.groups:
        assert len({split.photos[i].split for i in group.members}) == 1
    write_split(split, tmp_path / "data", "link", NullProgress())
    rows = list(read_csv(tmp_path / "data" / "findings.csv"))
    assert [row["finding"] for row in rows] == ["duplicate"] * 2 + ["label conflict"] * 2
    assert {row["detail"] for row in rows} == {"identical to the byte"}
