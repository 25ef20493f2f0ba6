import hashlib
import os
import shutil
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bnlab.data.duplicates import Fingerprint, find_groups, group_keys
from bnlab.data.photos import Photo
from bnlab.data.split import LinkMode, Split, assign_splits, hashed_number, split_folder, split_of_number, write_split
from bnlab.data.split_csv import read_split_csv
from bnlab.errors import DataError, StorageError
from bnlab.files import read_csv
from bnlab.progress import NullProgress
from tests.conftest import picture, write_photos

FEW = "val train train test train test test train test val val val"
VAL, TEST = 0.3, 0.2
SIDES = {"train", "val", "test"}
GOLDEN = "val train train test train val train train test train test val"

numbers = st.sets(st.integers(0, 10_000), min_size=1, max_size=30)


def photos_of(numbers: list[int], label: str = "a") -> list[tuple[Photo, Fingerprint]]:
    """Photos with different contents, no two of them near duplicates."""
    hashes = [hashlib.sha256(str(n).encode()).digest() for n in numbers]
    return [
        (Photo(f"{n}.jpg", label), Fingerprint(h.hex(), int.from_bytes(h[:8], "big"), h * 6))
        for n, h in zip(numbers, hashes, strict=True)
    ]


def splits_of(photos: list[tuple[Photo, Fingerprint]], seed: int = 0) -> dict[str, str]:
    fingerprints = [fingerprint for _, fingerprint in photos]
    keys = group_keys(fingerprints, find_groups(fingerprints))
    labelled = [(photo.label, key) for (photo, _), key in zip(photos, keys, strict=True)]
    splits = assign_splits(labelled, val=VAL, test=TEST, seed=seed)
    return {photo.path: split for (photo, _), split in zip(photos, splits, strict=True)}


def own_split(sha256: str, seed: int = 0) -> str:
    """The split of a photo by its number alone."""
    return split_of_number(hashed_number(sha256, seed), val=VAL, test=TEST)


def moved(photos: list[tuple[Photo, Fingerprint]]) -> set[str]:
    """The photos that are not where their number alone would place them."""
    splits = splits_of(photos)
    return {photo.path for photo, one in photos if splits[photo.path] != own_split(one.sha256)}


def split_of(folder: Path, val: float = 0.3, test: float = 0.0, seed: int = 0) -> Split:
    return split_folder(folder, val=val, test=test, seed=seed, progress=NullProgress())


@given(numbers, numbers)
@settings(max_examples=50)
def test_only_photos_that_were_moved_or_are_moved_change_when_others_are_added(
    some: set[int], others: set[int]
) -> None:
    before, after = photos_of(sorted(some)), photos_of(sorted(some | others))
    alone, together = splits_of(before), splits_of(after)
    assert {path for path in alone if together[path] != alone[path]} <= moved(before) | moved(after)
    assert len(moved(after)) <= 2
    if {own_split(one.sha256) for _, one in before} == SIDES:
        assert {path: together[path] for path in alone} == alone


@given(numbers, numbers)
@settings(max_examples=50)
def test_a_class_does_not_depend_on_the_other_classes(some: set[int], others: set[int]) -> None:
    ours, theirs = photos_of(sorted(some)), photos_of(sorted(others - some), "b")
    together = splits_of([*theirs, *ours])
    assert {path: together[path] for path in splits_of(ours)} == splits_of(ours)


@given(numbers)
@settings(max_examples=50)
def test_each_class_has_a_photo_in_each_split_if_it_has_enough(some: set[int]) -> None:
    photos = photos_of(sorted(some))
    found = set(splits_of(photos).values())
    assert found >= set(("train", "val", "test")[: len(some)])
    if {own_split(fingerprint.sha256) for _, fingerprint in photos} == SIDES:
        assert not moved(photos)


@given(st.sets(st.integers(0, 10_000), min_size=2, max_size=30), st.integers(0, 5))
@settings(max_examples=30)
def test_with_val_alone_a_photo_that_is_added_moves_no_other_away_from_its_number(some: set[int], seed: int) -> None:
    def splits(number_of: set[int]) -> dict[str, str]:
        keys = [fingerprint.sha256 for _, fingerprint in photos_of(sorted(number_of))]
        return dict(zip(keys, assign_splits([("a", key) for key in keys], val=0.1, test=0.0, seed=seed), strict=True))

    before, after = splits(some), splits(some | {20_000})
    for key, split in before.items():
        assert after[key] in (split, split_of_number(hashed_number(key, seed), val=0.1, test=0.0))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([("a", "x")], {"train"}),  # one photo
        ([("a", "x"), ("a", "x"), ("a", "x")], {"train"}),  # duplicates of each other
        ([("a", "x"), ("a", "y")], {"train", "val"}),
        ([("a", "x"), ("a", "y"), ("a", "z")], SIDES),
    ],
)
def test_train_matters_more_than_val_and_val_more_than_test(keys: list[tuple[str, str]], expected: set[str]) -> None:
    for seed in range(30):
        assert set(assign_splits(keys, val=0.3, test=0.3, seed=seed)) == expected
        assert set(assign_splits(keys, val=0.6, test=0.0, seed=seed)) == expected - {"test"}


def test_duplicates_in_several_classes_stay_together_and_are_not_moved() -> None:
    for seed in range(30):
        keys = [("a", "x"), ("b", "x"), ("a", "y"), ("a", "z"), ("b", "v"), ("b", "w")]
        splits = assign_splits(keys, val=0.3, test=0.3, seed=seed)
        assert splits[0] == splits[1] == split_of_number(hashed_number("x", seed), val=0.3, test=0.3)
        assert {splits[0], splits[2], splits[3]} == {splits[1], splits[4], splits[5]} == SIDES


def test_ten_photos_of_each_class_are_enough_for_val_at_any_seed() -> None:
    photos = [(label, f"{label}{n}") for label in "abcde" for n in range(10)]
    for seed in range(50):
        splits = assign_splits(photos, val=0.1, test=0.0, seed=seed)
        assert set(zip([label for label, _ in photos], splits, strict=True)) == set(product("abcde", ("train", "val")))


@given(numbers, st.randoms())
@settings(max_examples=50)
def test_the_order_of_photos_does_not_matter(some: set[int], random: object) -> None:
    shuffled = sorted(some)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert splits_of(photos_of(shuffled)) == splits_of(photos_of(sorted(some)))


@given(numbers, st.data())
@settings(max_examples=50)
def test_an_identical_copy_gets_the_same_split_and_moves_no_photo(some: set[int], data: st.DataObject) -> None:
    photos = photos_of(sorted(some))
    original = data.draw(st.sampled_from(photos))
    after = splits_of([*photos, (Photo("copy.jpg", "a"), original[1])])
    assert after == splits_of(photos) | {"copy.jpg": after[original[0].path]}


@given(numbers, st.data())
@settings(max_examples=50)
def test_a_near_duplicate_gets_the_same_split_as_its_original(some: set[int], data: st.DataObject) -> None:
    photos = photos_of(sorted(some))
    file, original = data.draw(st.sampled_from(photos))
    edited = Fingerprint(hashlib.sha256(b"edited").hexdigest(), original.phash ^ 1, original.thumbnail)
    both = [*photos, (Photo("edited.jpg", "a"), edited)]
    before, after = splits_of(photos), splits_of(both)
    assert after.pop("edited.jpg") == after[file.path]
    assert {path for path in after if after[path] != before[path]} <= moved(photos) | moved(both) | {file.path}


def test_a_split_never_changes_between_versions() -> None:
    """A version that moved these photos would move everyone's."""
    hashes = [hashlib.sha256(bytes([i])).hexdigest() for i in range(12)]
    numbers = [hashed_number(h, 7) for h in hashes]
    assert " ".join(split_of_number(number, val=0.3, test=0.3) for number in numbers) == GOLDEN
    assert " ".join(assign_splits([("a", h) for h in hashes], val=0.3, test=0.3, seed=7)) == GOLDEN
    few = assign_splits([(str(i % 4), h) for i, h in enumerate(hashes)], val=0.1, test=0.1, seed=7)
    assert " ".join(few) == FEW


@given(st.integers(0, 2**32 - 1), st.floats(0, 0.5), st.floats(0, 0.4))
@settings(max_examples=20)
def test_fractions_are_as_asked_for(seed: int, val: float, test: float) -> None:
    n = 2000
    counts = Counter(
        split_of_number(hashed_number(hashlib.sha256(str(i).encode()).hexdigest(), seed), val=val, test=test)
        for i in range(n)
    )
    for fraction, name in ((val, "val"), (test, "test")):
        assert abs(counts[name] - fraction * n) < 5 * (n * fraction * (1 - fraction)) ** 0.5 + 1


def test_another_seed_gives_another_split() -> None:
    photos = photos_of(list(range(200)))
    assert splits_of(photos, seed=0) != splits_of(photos, seed=1)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"a": 8}, "photos has only one class, 'a'"),
        ({"a": 8, "b": 0}, r"photos has only one class, 'a'; left out: b \(no photos\): "),
        ({"a": 1, "b": 1}, "2 photos, and in no class enough that differ: none was assigned to val: add photos"),
    ],
)
def test_too_few_photos_or_classes_are_refused(tmp_path: Path, classes: dict[str, int], message: str) -> None:
    for i, (label, number) in enumerate(classes.items()):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for n in range(number):
            picture("disc", 100 * i + n).save(tmp_path / "photos" / label / f"{n}.png")
    with pytest.raises(DataError, match=message):
        split_of(tmp_path / "photos", val=0.99)


def test_fractions_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", each=2)
    assert {tuple(numbers.values()) for numbers in split_of(photos, val=0.001).counts().values()} == {(1, 1, 0)}
    with pytest.raises(DataError, match=r"val 0.6 and test 0.5 leave nothing to split"):
        split_of(photos, val=0.6, test=0.5)


def test_a_class_of_broken_photos_is_named(photos: Path) -> None:
    (photos / "broken").mkdir()
    (photos / "broken" / "a.jpg").write_text("text")
    with pytest.raises(DataError, match=r"class 'broken' in .*no usable photo \(the first: it is not an image"):
        split_of(photos)


def test_a_class_of_duplicates_of_another_may_be_left_without_train(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", each=6)
    (photos / "twin").mkdir()
    shutil.copy(photos / "ring" / "ring000.png", photos / "twin" / "x.png")
    with pytest.raises(DataError, match=r"'twin' .* 1 photo, all duplicates of photos in other classes.*another seed"):
        for seed in range(10):
            split_of(photos, val=0.7, seed=seed)


def test_broken_photos_are_refused_and_counted(photos: Path) -> None:
    (photos / "disc" / "a.jpg").write_text("text")
    Image.new("RGB", (9, 9)).save(photos / "disc" / "b.png")
    split = split_of(photos)
    assert [Path(r.path).name for r in split.refused] == ["a.jpg"]
    assert len(split.photos) == 37


def test_a_folder_that_is_already_split_is_refused(data: Path) -> None:
    with pytest.raises(DataError) as error:
        split_of(data)
    assert str(error.value) == f"{data} is already split: train on it with `bnlab train {data}`"


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The content and the modification time of each file."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def test_a_split_folder_holds_every_photo_once(photos: Path, tmp_path: Path) -> None:
    split = split_of(photos, val=0.3, test=0.2)
    assert write_split(split, tmp_path / "data", "link", NullProgress())
    rows = list(read_csv(tmp_path / "data" / "split.csv"))
    assert list(rows[0]) == ["path", "class", "split", "sha256", "bytes", "modified"]
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
    with pytest.raises(DataError, match=r"data holds another split .*into"):
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
        with pytest.raises(DataError, match=r"never written to: .*into"):
            write_split(split, into, "link", NullProgress())
    with pytest.raises(DataError, match=r"contains .* itself: .*into"):
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
