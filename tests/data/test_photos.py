import os
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnlab.data import photos as photos_module
from bnlab.data.loader import TrainingLoader
from bnlab.data.photos import Photo, Photos
from bnlab.data.split_csv import as_label, read_split_csv, write_rows

BYTES_EACH = (
    85  # a name of 20 bytes, 8 to find it, 32 of SHA-256, 4 each of folder, class and position, 2 of side and kind
)
DIGESTS = st.binary(min_size=32, max_size=32).map(bytes.hex)
# What a file can be called, undecodable bytes and all, and what trips tables up.
NAMES = st.binary(min_size=1, max_size=8).map(os.fsdecode) | st.text(
    ",\"'\n\r; \té百\U0001f33c/", min_size=1, max_size=8
)
PHOTOS = st.lists(
    st.builds(Photo, NAMES, st.sampled_from("abc"), st.sampled_from(["train", "val", "test"]), DIGESTS | st.just("")),
    max_size=12,
)
LISTED = [
    Photo("a/1", "rose", "train", "ab" * 32),
    Photo("a/2", "lily", "val", ""),
    Photo("b/1", "rose", "val", "ab" * 32),
    Photo("b/2", "lily", "train", "AB" * 32),
]


def many(number: int) -> Photos:
    return Photos.of(
        Photo(
            f"/data/imagenet/ILSVRC2012/train/n{i % 100:08}/n{i % 100:08}_{i:06}.jpg",
            f"n{i % 100:08}",
            "train" if i % 20 else "val",
            f"{i:064x}",
        )
        for i in range(number)
    )


@given(PHOTOS)
def test_photos_are_what_they_were(listed: list[Photo]) -> None:
    photos = Photos.of(iter(listed))
    assert list(photos) == [photos[i] for i in range(len(photos))] == listed
    assert list(photos.paths) == [photos.paths[i] for i in range(len(listed))] == [photo.path for photo in listed]
    assert photos == Photos.of(listed)
    assert Photos.of(photos) is photos


@given(PHOTOS)
def test_a_list_on_disk_gives_the_same_photos(listed: list[Photo]) -> None:
    listed = [Photo(f"/{photo.path.strip('/')}x", photo.label, photo.split, photo.sha256) for photo in listed]
    listed = [photo for photo in listed if photo.path == str(Path(photo.path))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "split.csv")
        write_rows(path, Photos.of([*LISTED, *listed]))
        assert list(read_split_csv(path))[len(LISTED) :] == [
            Photo(photo.path, as_label(photo.label), photo.split, photo.sha256) for photo in listed
        ]


@given(PHOTOS, st.data())
def test_choices_are_those_of_a_list(listed: list[Photo], data: st.DataObject) -> None:
    photos = Photos.of(listed)
    positions = data.draw(st.lists(st.integers(0, len(listed) - 1), max_size=20) if listed else st.just([]))
    taken = photos.take(np.array(positions, dtype=np.int64))
    assert list(taken) == [listed[i] for i in positions]
    for split in ("train", "val", "test", "other"):
        assert list(taken.in_split(split)) == [listed[i] for i in positions if listed[i].split == split]
    some = data.draw(st.slices(len(listed)))
    assert list(photos[some]) == listed[some]
    assert list(photos.paths[some]) == [photo.path for photo in listed[some]]
    assert taken.labels == sorted({listed[i].label for i in positions})
    assert taken.splits == {listed[i].split for i in positions}
    assert taken.counts() == Counter((listed[i].label, listed[i].split) for i in positions)
    assert taken.class_indices("cab").tolist() == ["cab".index(listed[i].label) for i in positions]
    assert taken.hashed.tolist() == [bool(listed[i].sha256) for i in positions]
    numbers = Counter(listed[i].path for i in positions)
    assert taken.first_repeated_path() == next((listed[i].path for i in positions if numbers[listed[i].path] > 1), None)


@given(PHOTOS, PHOTOS)
def test_shared_content_is_counted(ours: list[Photo], theirs: list[Photo]) -> None:
    theirs += ours[::2]
    known = {photo.sha256 for photo in theirs} - {""}
    assert Photos.of(ours).count_shared(Photos.of(theirs)) == sum(photo.sha256 in known for photo in ours)


def test_content_is_compared_whole() -> None:
    """Not by its first eight bytes alone, nor by its letters' case."""
    one, other = (Photos.of([Photo("a", "a", "val", "0" * 62 + end)]) for end in ("01", "02"))
    assert one.count_shared(other) == 0
    photos = Photos.of(LISTED)
    assert [photos.take(np.array([i])).count_shared(photos[2:]) for i in range(4)] == [1, 0, 1, 1]


def test_paths_are_compared_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by their hashes alone."""
    monkeypatch.setattr(photos_module, "hash", lambda _: 7, raising=False)
    photos = Photos.of(LISTED)
    assert photos.first_repeated_path() is None
    assert Photos.of([*LISTED, LISTED[2]]).first_repeated_path() == "b/1"
    assert not photos[1:2].with_sha256_of(photos[:1]).hashed.any()


def test_the_sha256_of_other_photos_is_found_by_path() -> None:
    known = [Photo("b/2", "", "", "cd" * 32), Photo("a/2", "", "", "ef" * 32), Photo("b/2", "", "", "12" * 32)]
    photos = Photos.of(Photo(path, "rose", "val", "") for path in ("a/1", "a/2", "a/3", "b/2", "b/3"))
    assert [photo.sha256 for photo in photos.with_sha256_of(Photos.of(known))] == ["", "ef" * 32, "", "12" * 32, ""]
    assert not photos.hashed.any()
    assert [photo.sha256 for photo in photos[2:].with_sha256([(1, "ab" * 32)])] == ["", "ab" * 32, ""]


def test_a_class_that_is_none_of_them() -> None:
    with pytest.raises(KeyError, match="lily"):
        Photos.of(LISTED).class_indices(["rose"])
    assert Photos.of(LISTED)[::2].class_indices(["rose"]).tolist() == [0, 0]


def test_photos_are_equal_by_what_they_are() -> None:
    photos = Photos.of(LISTED)
    assert photos[:3] == Photos.of(LISTED[:3])
    assert photos[:3] != photos[1:]
    assert photos != photos[:3]
    assert photos != LISTED
    assert repr(photos) == "<4 photos of 2 classes>"


def test_a_photo_takes_few_bytes() -> None:
    number = 50_000
    tracemalloc.start()
    try:
        photos = many(number)
        kept, peak = tracemalloc.get_traced_memory()
        assert kept / number < BYTES_EACH
        assert peak / number < BYTES_EACH + 25  # an array that grows may move, and is then there twice
        sides = [photos.in_split("train"), photos.in_split("val")]
        loader = TrainingLoader(
            sides[0],
            photos.labels,
            short_side=0,
            area=(0.5, 1.0),
            aspect=(0.75, 1.33),
            flip=0.5,
            batch_size=16,
            seed=0,
            workers=0,
        )
        with_loader = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(loader.paths) + len(sides[1]) == number
    assert (with_loader - kept) / number < 13  # a position and a label
