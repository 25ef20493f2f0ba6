import hashlib
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.conftest import picture, write_photos

from bnlab.data import split as split_module
from bnlab.data.duplicates import Fingerprint, groups
from bnlab.data.scan import Found
from bnlab.data.split import Split, _assigned, read_list, side, split_folder, write_list, write_split
from bnlab.errors import DataError, StorageError
from bnlab.files import read_csv
from bnlab.progress import Silent

names = st.sets(st.integers(0, 10_000), min_size=1, max_size=40)


def prints(numbers: list[int]) -> list[tuple[Found, Fingerprint]]:
    """Photos with these contents, none near another."""
    hashes = [hashlib.sha256(str(n).encode()).digest() for n in numbers]
    return [
        (Found(f"{n}.jpg", "a"), Fingerprint(h.hex(), int.from_bytes(h[:8], "big"), h * 6))
        for n, h in zip(numbers, hashes, strict=True)
    ]


def sides(examined: list[tuple[Found, Fingerprint]], seed: int = 0) -> dict[str, str]:
    found = groups([fingerprint for _, fingerprint in examined])
    return {p.path: p.split for p in _assigned(examined, found, val=0.3, test=0.2, seed=seed)}


def do(folder: Path, val: float = 0.3, test: float = 0.0, seed: int = 0) -> Split:
    return split_folder(folder, val=val, test=test, seed=seed, progress=Silent())


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Each file with its content and its time."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


@given(names, names)
def test_a_photo_stays_when_others_come_and_go(some: set[int], others: set[int]) -> None:
    alone, together = sides(prints(sorted(some))), sides(prints(sorted(some | others)))
    assert {path: together[path] for path in alone} == alone


@given(names, st.randoms())
def test_the_order_of_photos_does_not_matter(some: set[int], random: object) -> None:
    shuffled = sorted(some)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert sides(prints(shuffled)) == sides(prints(sorted(some)))


@given(names, st.data())
def test_duplicates_share_a_side_and_move_nobody_else(some: set[int], data: st.DataObject) -> None:
    examined = prints(sorted(some))
    twin = data.draw(st.sampled_from(examined))
    copy = (Found("copy.jpg", "b"), twin[1])
    after = sides([*examined, copy])
    assert after == sides(examined) | {"copy.jpg": after[twin[0].path]}


@given(st.integers(0, 2**32 - 1), st.floats(0, 0.5), st.floats(0, 0.4))
@settings(max_examples=20)
def test_shares_are_as_asked_for(seed: int, val: float, test: float) -> None:
    n = 2000
    counts = Counter(side(hashlib.sha256(str(i).encode()).hexdigest(), val=val, test=test, seed=seed) for i in range(n))
    for share, name in ((val, "val"), (test, "test")):
        assert abs(counts[name] - share * n) < 5 * (n * share * (1 - share)) ** 0.5 + 1


def test_another_seed_is_another_split() -> None:
    examined = prints(list(range(200)))
    assert sides(examined, seed=0) != sides(examined, seed=1)


def test_a_split_folder_holds_every_photo_once(photos: Path, tmp_path: Path) -> None:
    split = do(photos, val=0.3, test=0.2)
    assert write_split(split, tmp_path / "data", "link", Silent())
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
    split = do(photos)
    write_split(split, tmp_path / "copies", "copy", Silent())

    def no_links(*_: object) -> None:
        raise OSError("this file system has no hard links")

    monkeypatch.setattr(os, "link", no_links)
    write_split(split, tmp_path / "fallen", "link", Silent())
    for name in ("copies", "fallen"):
        row = read_list(tmp_path / name / "split.csv")[0]
        assert not Path(row.path).samefile(split.photos[0].path)
        assert Path(row.path).read_bytes() == Path(split.photos[0].path).read_bytes()


def test_the_list_alone(photos: Path, tmp_path: Path) -> None:
    split = do(photos)
    write_split(split, tmp_path / "data", "list", Silent())
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["split.csv"]
    assert read_list(tmp_path / "data" / "split.csv") == split.photos


@pytest.mark.parametrize("how", ["link", "copy", "list"])
def test_again_changes_nothing(photos: Path, tmp_path: Path, how: split_module.How) -> None:
    assert write_split(do(photos), tmp_path / "data", how, Silent())
    before = tree(tmp_path)
    assert not write_split(do(photos), tmp_path / "data", how, Silent())
    assert tree(tmp_path) == before


def test_another_split_is_never_written_over(photos: Path, tmp_path: Path) -> None:
    write_split(do(photos), tmp_path / "data", "link", Silent())
    before = tree(tmp_path)
    with pytest.raises(DataError, match=r"holds another split .*: give --into a new folder, or remove this one"):
        write_split(do(photos, seed=1), tmp_path / "data", "link", Silent())
    with pytest.raises(DataError, match="holds the same split as links, not copies"):
        write_split(do(photos), tmp_path / "data", "copy", Silent())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="exists and is no split of bnlab"):
        write_split(do(photos), tmp_path / "mine", "link", Silent())
    after = tree(tmp_path)
    assert after.pop("mine/thesis.txt")[0] == b"years of work"
    assert after == before


def test_photos_are_never_written_to(photos: Path) -> None:
    for into in (photos, photos / "data", photos / "disc"):
        with pytest.raises(DataError, match="which is never written to: give --into another folder"):
            write_split(do(photos), into, "link", Silent())
    with pytest.raises(DataError, match=r"holds .* itself: give --into a new folder"):
        write_split(do(photos), photos.parent, "link", Silent())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_split_that_fails_leaves_nothing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    split = do(photos)
    real, calls = shutil.copy2, 0

    def failing(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls > 10:
            raise error
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(shutil, "copy2", failing)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else StorageError):
        write_split(split, tmp_path / "data", "copy", Silent())
    assert calls == 11
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


def test_duplicates_and_conflicts_are_named(photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "disc" / "disc000.png", photos / "disc" / "again.png")
    shutil.copy(photos / "ring" / "ring000.png", photos / "stripes" / "wrong.png")
    split = do(photos)
    assert [len(group.members) for group in split.groups] == [2, 2]
    (conflict,) = split.conflicts
    members = [split.photos[i] for i in conflict.members]
    assert {(Path(p.path).name, p.label) for p in members} == {("ring000.png", "ring"), ("wrong.png", "stripes")}
    for group in split.groups:
        assert len({split.photos[i].split for i in group.members}) == 1
    write_split(split, tmp_path / "data", "link", Silent())
    rows = list(read_csv(tmp_path / "data" / "findings.csv"))
    assert [row["finding"] for row in rows] == ["duplicate"] * 2 + ["duplicate, label conflict"] * 2


def test_odd_names_survive(tmp_path: Path) -> None:
    odd = ["a \"b\" 'c'.png", "new\nline.png", "百合 花.png", " lead.png", "comma, semi; $.png", "-dash.png"]
    photos = write_photos(tmp_path / "photos", each=6)
    for number, name in enumerate(odd):
        picture("disc", 50 + number).save(photos / "disc" / name)
    write_split(do(photos), tmp_path / "data", "copy", Silent())
    listed = read_list(tmp_path / "data" / "split.csv")
    assert {Path(p.path).name for p in listed} >= set(odd)
    assert all(Path(p.path).is_file() for p in listed)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"a": 8}, "photos has one class only, 'a': a classifier tells at least two apart; add another sub-folder"),
        ({"a": 8, "b": 0}, "class 'b' has no photos in "),
        ({"a": 1, "b": 1}, "and none fell to train: add photos, hold out less or take another --seed"),
    ],
)
def test_too_little_to_split(tmp_path: Path, classes: dict[str, int], message: str) -> None:
    for i, (label, number) in enumerate(classes.items()):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for n in range(number):
            picture("disc", 100 * i + n).save(tmp_path / "photos" / label / f"{n}.png")
    with pytest.raises(DataError) as error:
        do(tmp_path / "photos", val=0.99)
    assert message in str(error.value)


def test_too_few_for_a_val_share(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", each=2)
    with pytest.raises(DataError, match=r"has 6 photos, too few for a val share of 0.001: none fell to it: add photos"):
        do(photos, val=0.001)
    with pytest.raises(DataError, match="leave nothing to split"):
        do(photos, val=0.6, test=0.5)


def test_a_class_of_broken_photos_is_named(photos: Path) -> None:
    (photos / "broken").mkdir()
    (photos / "broken" / "a.jpg").write_text("text")
    with pytest.raises(
        DataError, match=r"class 'broken' in .* has no photo that can be used \(the first: it is no pict"
    ):
        do(photos)


def test_broken_photos_are_refused_and_counted(photos: Path) -> None:
    (photos / "disc" / "a.jpg").write_text("text")
    Image.new("RGB", (9, 9)).save(photos / "disc" / "b.png")
    split = do(photos)
    assert [Path(r.path).name for r in split.refused] == ["a.jpg"]
    assert len(split.photos) == 37


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,class\na.jpg,a\n", "has no 'split' in row 2: it needs the columns path, class, split, sha256"),
        ("path,class,split,sha256\na.jpg,a,dev,0\n", "has the split 'dev' in row 2: say train, val, test"),
        ("path,class,split,sha256\n", "lists no photos: it needs the columns"),
    ],
)
def test_a_list_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "split.csv").write_text(text)
    with pytest.raises(DataError) as error:
        read_list(tmp_path / "split.csv")
    assert message in str(error.value)


def test_lists_are_read_from_anywhere(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_list(tmp_path / "list.csv", do(Path("photos")).photos)
    monkeypatch.chdir("/")
    assert all(Path(p.path).is_file() for p in read_list(tmp_path / "list.csv"))
