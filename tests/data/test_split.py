import hashlib
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.conftest import picture, write_photos

from bnlab.data.duplicates import Fingerprint, find_groups
from bnlab.data.scan import PhotoFile
from bnlab.data.split import Split, assign, assign_split, split_folder
from bnlab.errors import DataError
from bnlab.progress import NullProgress

GOLDEN = "val train train test train val train train test train test val"

names = st.sets(st.integers(0, 10_000), min_size=1, max_size=40)


def prints(numbers: list[int]) -> list[tuple[PhotoFile, Fingerprint]]:
    """Photos with these contents, none near another."""
    hashes = [hashlib.sha256(str(n).encode()).digest() for n in numbers]
    return [
        (PhotoFile(f"{n}.jpg", "a"), Fingerprint(h.hex(), int.from_bytes(h[:8], "big"), h * 6))
        for n, h in zip(numbers, hashes, strict=True)
    ]


def sides(examined: list[tuple[PhotoFile, Fingerprint]], seed: int = 0) -> dict[str, str]:
    found = find_groups([fingerprint for _, fingerprint in examined])
    return {p.path: p.split for p in assign(examined, found, val=0.3, test=0.2, seed=seed)}


def do(folder: Path, val: float = 0.3, test: float = 0.0, seed: int = 0) -> Split:
    return split_folder(folder, val=val, test=test, seed=seed, progress=NullProgress())


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
    copy = (PhotoFile("copy.jpg", "b"), twin[1])
    after = sides([*examined, copy])
    assert after == sides(examined) | {"copy.jpg": after[twin[0].path]}


@given(names, st.data())
def test_near_duplicates_share_a_side_and_move_nobody_else(some: set[int], data: st.DataObject) -> None:
    examined = prints(sorted(some))
    found, original = data.draw(st.sampled_from(examined))
    edited = Fingerprint(hashlib.sha256(b"edited").hexdigest(), original.phash ^ 1, original.miniature)
    after = sides([*examined, (PhotoFile("edited.jpg", "a"), edited)])
    assert after["edited.jpg"] == after[found.path]
    before = sides(examined)
    assert {path: side for path, side in after.items() if path not in (found.path, "edited.jpg")} == {
        path: side for path, side in before.items() if path != found.path
    }


def test_a_split_is_the_same_for_ever() -> None:
    """Worked out once: a later version that moved these would move everyone's photos."""
    hashes = [hashlib.sha256(bytes([i])).hexdigest() for i in range(12)]
    assert " ".join(assign_split(h, val=0.3, test=0.3, seed=7) for h in hashes) == GOLDEN


@given(st.integers(0, 2**32 - 1), st.floats(0, 0.5), st.floats(0, 0.4))
@settings(max_examples=20)
def test_shares_are_as_asked_for(seed: int, val: float, test: float) -> None:
    n = 2000
    counts = Counter(
        assign_split(hashlib.sha256(str(i).encode()).hexdigest(), val=val, test=test, seed=seed) for i in range(n)
    )
    for share, name in ((val, "val"), (test, "test")):
        assert abs(counts[name] - share * n) < 5 * (n * share * (1 - share)) ** 0.5 + 1


def test_another_seed_is_another_split() -> None:
    examined = prints(list(range(200)))
    assert sides(examined, seed=0) != sides(examined, seed=1)


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
        DataError, match=r"class 'broken' in .* has no photo that can be used \(the first: it is not an im"
    ):
        do(photos)


def test_broken_photos_are_refused_and_counted(photos: Path) -> None:
    (photos / "disc" / "a.jpg").write_text("text")
    Image.new("RGB", (9, 9)).save(photos / "disc" / "b.png")
    split = do(photos)
    assert [Path(r.path).name for r in split.refused] == ["a.jpg"]
    assert len(split.photos) == 37


def test_what_is_split_already_is_refused(data: Path) -> None:
    with pytest.raises(DataError) as error:
        do(data)
    assert str(error.value) == f"{data} is split already: train on it: bnlab train {data}"
