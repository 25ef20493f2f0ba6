from pathlib import Path

import pytest

from bnlab.data.location import Place, places, root_of, where_they_are
from bnlab.data.photos import Photo, Photos
from bnlab.errors import DataError


def photos_at(*paths: str) -> Photos:
    return Photos.of(Photo(path, "a", "train") for path in paths)


def test_the_root_is_data_or_the_folder_that_holds_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    inside = photos_at("data/train/a/1.jpg", "data/train/b/2.jpg")
    assert root_of(inside, Path("data")) == str(tmp_path / "data")
    assert root_of(inside, Path("data/split.csv")) == str(tmp_path / "data")
    assert root_of(photos_at("/p/a/1.jpg", "/p/ab/2.jpg"), Path("data")) == "/p"
    assert root_of(photos_at("/p/1.jpg", "/q/2.jpg"), Path("data")) == "/"


def test_paths_move_with_their_folder() -> None:
    listed = photos_at("/p/data/a/1.jpg", "/p/data/2.jpg", "/p/database/3.jpg")
    assert list(Place("/p/data", "/q").of(listed).paths) == ["/q/a/1.jpg", "/q/2.jpg", "/p/database/3.jpg"]
    assert Place("/", "/mnt").of(listed)[0].path == "/mnt/p/data/a/1.jpg"
    assert Place("/p", "/").of(listed)[0].path == "/data/a/1.jpg"
    assert listed[0].path == "/p/data/a/1.jpg"


def test_a_moved_project_finds_its_photos(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old / "data" / "a", old / "runs" / "x"):
        folder.mkdir(parents=True)
    (old / "data" / "a" / "1.jpg").touch()
    listed = photos_at(f"{old}/data/a/1.jpg")
    Place(f"{old}/data", f"{old}/data").record(old / "runs" / "x")
    split_csv = new / "runs" / "x" / "split.csv"
    assert [place.now for place in places(old / "runs" / "x" / "split.csv", listed)] == [f"{old}/data"]
    old.rename(new)
    assert [place.now for place in places(split_csv, listed)] == [f"{old}/data", f"{new}/data"]
    assert list(where_they_are(split_csv, listed).paths) == [f"{new}/data/a/1.jpg"]
    (new / "data").rename(new / "elsewhere")
    with pytest.raises(DataError, match=rf"neither in {old}/data nor in {new}/data: move .*pass .* DATA"):
        where_they_are(split_csv, listed)


@pytest.mark.parametrize("content", ["{", "[]", '{"root": 3}'])
def test_without_a_readable_record_the_list_alone_counts(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.json").write_text(content)
    listed = photos_at("/p/a/1.jpg", "/p/b/2.jpg")
    assert list(places(tmp_path / "split.csv", listed)) == [Place("/p", "/p")]
    assert where_they_are(tmp_path / "split.csv", listed) is listed


def test_links_are_kept(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to("disk")
    assert root_of(photos_at(f"{tmp_path}/data/a/1.jpg"), tmp_path / "data") == f"{tmp_path}/data"
