import os
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bnlab.data import photos as module
from bnlab.data.loader import TrainingLoader
from bnlab.data.photos import Content, Photo, Photos

# A name of 20 bytes and its offset of 8, 32 of SHA-256, 16 of size and time, and 4 each for folder, class with split,
# and position.
BYTES_PER_PHOTO = 101
DIGESTS = st.binary(min_size=32, max_size=32).filter(any).map(bytes.hex)
ANY = st.text(st.characters(), max_size=8)  # with surrogates
# What a file can be called, with undecodable bytes.
NAMES = st.binary(min_size=1, max_size=8).map(os.fsdecode) | ANY
PHOTOS = st.lists(
    st.builds(Photo, NAMES, st.sampled_from("abc"), st.sampled_from(["train", "val", "test"]), DIGESTS | st.just("")),
    max_size=12,
)
ODD_PHOTOS = st.lists(st.builds(Photo, NAMES, ANY, ANY, DIGESTS | st.just("")), max_size=12)
FOUR = [
    Photo("a/1", "rose", "train", "ab" * 32),
    Photo("a/2", "lily", "val", ""),
    Photo("b/1", "rose", "val", "ab" * 32),
    Photo("b/2", "lily", "train", "AB" * 32),  # the same in capital letters
]


@given(PHOTOS | ODD_PHOTOS)
@example([Photo("\udcc3\udca9/\ud800", "a", "val")])  # "é" in undecodable bytes must stay that
@example([Photo("", "")])
def test_photos_are_kept_as_they_are(listed: list[Photo]) -> None:
    photos = Photos.of(iter(listed))
    assert list(photos) == [photos[i] for i in range(len(photos))] == listed
    assert list(photos.paths) == [photos.paths[i] for i in range(len(listed))] == [photo.path for photo in listed]
    assert photos.hashed.tolist() == [photo.sha256 != "" for photo in listed]
    assert Photos.of(photos) is photos


def test_only_a_sha256_is_kept_as_one() -> None:
    """It is the same in capital letters. All zeros stand for none."""
    photos = Photos.of(Photo("a", "a", "val", text) for text in ("AB" * 32, "ab" * 31, "0" * 64, "none", "\udcff"))
    assert [photo.sha256 for photo in photos] == ["ab" * 32, "", "", "", ""]
    assert photos.hashed.tolist() == [True, False, False, False, False]


def test_more_photos_than_are_converted_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [Photo(f"/{i % 3}/{i}.jpg", str(i % 3), "val", f"{i:064x}") for i in range(1, 8)]
    monkeypatch.setattr(module, "CHUNK", 3)
    assert list(Photos.of(listed)) == listed


@given(PHOTOS, st.data())
def test_selections_are_those_of_a_list(listed: list[Photo], data: st.DataObject) -> None:
    photos = Photos.of(listed)
    positions = data.draw(st.lists(st.integers(0, len(listed) - 1), max_size=20) if listed else st.just([]))
    taken = photos[np.array(positions, dtype=np.int64)]
    assert list(taken) == [listed[i] for i in positions]
    for split in ("train", "val", "test", "other"):
        assert list(taken.in_split(split)) == [listed[i] for i in positions if listed[i].split == split]
    assert list(taken.in_split("train", "test")) == [listed[i] for i in positions if listed[i].split != "val"]
    assert list(photos[photos.hashed]) == [photo for photo in listed if photo.sha256]
    some = data.draw(st.slices(len(listed)))
    assert list(photos[some]) == listed[some]
    assert list(photos.paths[some]) == [photo.path for photo in listed[some]]
    assert taken.labels == sorted({listed[i].label for i in positions})
    assert taken.splits == {listed[i].split for i in positions}
    assert taken.counts() == Counter((listed[i].label, listed[i].split) for i in positions)
    assert taken.class_indices("cab").tolist() == ["cab".index(listed[i].label) for i in positions]
    numbers = Counter(listed[i].path for i in positions)
    assert taken.first_repeated_path() == next((listed[i].path for i in positions if numbers[listed[i].path] > 1), None)


@given(PHOTOS, PHOTOS)
@settings(max_examples=50)
def test_shared_content_is_counted(ours: list[Photo], theirs: list[Photo]) -> None:
    theirs += ours[::2]
    known = {photo.sha256 for photo in theirs} - {""}
    assert Photos.of(ours).count_shared(Photos.of(theirs)) == sum(photo.sha256 in known for photo in ours)


def test_the_complete_sha256_is_compared() -> None:
    one, other = (Photos.of([Photo("a", "a", "val", "0" * 62 + end)]) for end in ("01", "02"))
    assert one.count_shared(other) == 0
    photos = Photos.of(FOUR)
    assert [photos[i : i + 1].count_shared(photos[1:3]) for i in range(4)] == [1, 0, 1, 1]


def test_paths_are_compared_and_not_only_their_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "hash", lambda _: 7, raising=False)
    photos = Photos.of(FOUR)
    assert photos.first_repeated_path() is None
    assert Photos.of([*FOUR, FOUR[2]]).first_repeated_path() == "b/1"
    assert not photos[1:2].with_content_of(photos[:1]).hashed.any()


def test_content_can_be_added_by_position_or_by_path() -> None:
    photos = Photos.of(Photo(path, "rose", "val", "") for path in ("a/1", "a/2", "a/3", "b/2", "b/3"))
    known = [
        Photo("b/2", "", "", "cd" * 32), Photo("a/2", "", "", "ef" * 32, (3, 4)), Photo("b/2", "", "", "12" * 32)
    ]  # fmt: skip
    assert [photo.sha256 for photo in photos.with_content_of(Photos.of(known))] == ["", "ef" * 32, "", "12" * 32, ""]
    assert [photo.sha256 for photo in photos[2:].with_content([(1, Content("ab" * 32, (5, 7)))])] == ["", "ab" * 32, ""]
    assert not photos.hashed.any()  # the original is unchanged


def test_a_class_that_is_not_in_the_list_is_an_error() -> None:
    with pytest.raises(KeyError, match="lily"):
        Photos.of(FOUR).class_indices(["rose"])
    assert Photos.of(FOUR)[::2].class_indices(["rose"]).tolist() == [0, 0]


def test_a_photo_takes_few_bytes() -> None:
    number = 20_000
    tracemalloc.start()
    try:
        photos = Photos.of(
            Photo(
                f"/data/imagenet/ILSVRC2012/train/n{i % 100:08}/n{i % 100:08}_{i:06}.jpg",
                f"n{i % 100:08}",
                "train" if i % 20 else "val",
                f"{i:064x}",
                (100_000 + i, 1_700_000_000_000_000_000 + i),
            )
            for i in range(1, number + 1)
        )
        kept, peak = tracemalloc.get_traced_memory()
        assert kept / number < BYTES_PER_PHOTO
        assert peak / number < BYTES_PER_PHOTO + 25  # an array that grows may move, and then exists twice
        train, val = photos.in_split("train"), photos.in_split("val")
        loader = TrainingLoader(
            train,
            photos.labels,
            short_side=0,
            augment=lambda photo, size, random: photo,
            batch_size=16,
            seed=0,
            workers=0,
        )
        with_loader = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(loader.paths) + len(val) == number
    assert (with_loader - kept) / number < 13  # a position and a label
