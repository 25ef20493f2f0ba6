import hashlib
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bnlab.data.duplicates import Fingerprint, find_groups
from bnlab.data.photos import Photo
from bnlab.data.split import Split, assign_split, assign_splits, split_folder
from bnlab.errors import DataError
from bnlab.progress import NullProgress
from tests.conftest import picture, write_photos

GOLDEN = "val train train test train val train train test train test val"

numbers = st.sets(st.integers(0, 10_000), min_size=1, max_size=30)


def photos_of(numbers: list[int]) -> list[tuple[Photo, Fingerprint]]:
    """Photos with different contents, no two of them near duplicates."""
    hashes = [hashlib.sha256(str(n).encode()).digest() for n in numbers]
    return [
        (Photo(f"{n}.jpg", "a"), Fingerprint(h.hex(), int.from_bytes(h[:8], "big"), h * 6))
        for n, h in zip(numbers, hashes, strict=True)
    ]


def splits_of(photos: list[tuple[Photo, Fingerprint]], seed: int = 0) -> dict[str, str]:
    groups = find_groups([fingerprint for _, fingerprint in photos])
    return {p.path: p.split for p in assign_splits(photos, groups, val=0.3, test=0.2, seed=seed)}


def split_of(folder: Path, val: float = 0.3, test: float = 0.0, seed: int = 0) -> Split:
    return split_folder(folder, val=val, test=test, seed=seed, progress=NullProgress())


@given(numbers, numbers)
@settings(max_examples=50)
def test_a_photo_stays_when_others_are_added(some: set[int], others: set[int]) -> None:
    alone, together = splits_of(photos_of(sorted(some))), splits_of(photos_of(sorted(some | others)))
    assert {path: together[path] for path in alone} == alone


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
    after = splits_of([*photos, (Photo("copy.jpg", "b"), original[1])])
    assert after == splits_of(photos) | {"copy.jpg": after[original[0].path]}


@given(numbers, st.data())
@settings(max_examples=50)
def test_a_near_duplicate_gets_the_same_split_and_moves_only_its_original(some: set[int], data: st.DataObject) -> None:
    photos = photos_of(sorted(some))
    file, original = data.draw(st.sampled_from(photos))
    edited = Fingerprint(hashlib.sha256(b"edited").hexdigest(), original.phash ^ 1, original.thumbnail)
    before, after = splits_of(photos), splits_of([*photos, (Photo("edited.jpg", "a"), edited)])
    assert after.pop("edited.jpg") == after.pop(file.path)
    del before[file.path]
    assert after == before


def test_a_split_never_changes_between_versions() -> None:
    """A version that moved these photos would move everyone's."""
    hashes = [hashlib.sha256(bytes([i])).hexdigest() for i in range(12)]
    assert " ".join(assign_split(h, val=0.3, test=0.3, seed=7) for h in hashes) == GOLDEN


@given(st.integers(0, 2**32 - 1), st.floats(0, 0.5), st.floats(0, 0.4))
@settings(max_examples=20)
def test_fractions_are_as_asked_for(seed: int, val: float, test: float) -> None:
    n = 2000
    counts = Counter(
        assign_split(hashlib.sha256(str(i).encode()).hexdigest(), val=val, test=test, seed=seed) for i in range(n)
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
        ({"a": 8, "b": 0}, "class 'b' has no photos"),
        ({"a": 1, "b": 1}, "class 'a' .*none was assigned to train: .*--seed"),
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
    with pytest.raises(DataError, match=r"6 photos, too few for a val fraction of 0.001: .*--val .*--seed"):
        split_of(photos, val=0.001)
    with pytest.raises(DataError, match=r"val 0.6 and test 0.5 leave nothing to split"):
        split_of(photos, val=0.6, test=0.5)


def test_a_class_of_broken_photos_is_named(photos: Path) -> None:
    (photos / "broken").mkdir()
    (photos / "broken" / "a.jpg").write_text("text")
    with pytest.raises(DataError, match=r"class 'broken' in .*no usable photo \(the first: it is not an image"):
        split_of(photos)


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
