import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bnlab.data.dataset import open_recorded_data
from bnlab.data.photo_file import PhotoReader
from bnlab.data.split_csv import read_split_csv
from bnlab.errors import DataError
from bnlab.lab import splits as module
from bnlab.lab.measurements import Measurement, _photos_digest
from bnlab.lab.splits import StudySplits, open_study_splits
from bnlab.progress import NullProgress


def opened(data: Path | None, folder: Path, *, quick: bool = True, min_photos: int = 10) -> StudySplits:
    return open_study_splits(data, quick=quick, min_photos=min_photos, folder=folder, progress=NullProgress())


def counts(splits: StudySplits, seed: int) -> Counter[str]:
    return Counter(photo.split for photo in read_split_csv(splits.for_seed(seed)))


def test_each_seed_has_its_own_split_which_is_always_the_same(photos: Path, tmp_path: Path) -> None:
    splits = opened(photos, tmp_path / "a")
    assert (len(splits), splits.classes, splits.kind, splits.name) == (72, 3, "photos", photos.name)
    first = {photo.path: photo.split for photo in read_split_csv(splits.for_seed(0))}
    other = {photo.path: photo.split for photo in read_split_csv(splits.for_seed(1))}
    assert set(first.values()) == {"train", "val", "test"}
    assert first != other
    again = {photo.path: photo.split for photo in read_split_csv(opened(photos, tmp_path / "b").for_seed(0))}
    assert again == first
    assert 8 <= counts(splits, 0)["test"] <= 36


def test_one_photo_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "one" / "a").mkdir(parents=True)
    shutil.copy(next(photos.glob("*/*")), tmp_path / "one" / "a")
    problem = "one has 1 usable photo of 1 class: this study needs 10 photos of 2 classes or more"
    with pytest.raises(DataError, match=problem):
        opened(tmp_path / "one", tmp_path / "a")


def test_other_labels_give_another_split_csv(photos: Path, tmp_path: Path) -> None:
    """Otherwise a corrected label, or a photo moved out of test, would be missed."""
    splits = opened(photos, tmp_path / "a")
    before = splits.for_seed(0)
    text = before.read_text()
    corrected = [replace(photo, label="ring") if i == 0 else photo for i, photo in enumerate(splits.photos)]
    other = StudySplits(splits.name, splits.kind, tmp_path / "a", corrected, len(corrected))
    assert other.for_seed(0) != before
    assert Counter(p.label for p in read_split_csv(other.for_seed(0)))["ring"] == 25
    assert splits.for_seed(0).read_text() == text


def test_quick_uses_some_photos_of_each_split(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    for i, photo in enumerate(sorted(photos.glob("*/*.png"))):
        job = data / ("test" if i % 6 == 0 else "train") / photo.parent.name
        job.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, job / photo.name)
    monkeypatch.setattr(module, "QUICK_PHOTOS", 30)
    splits = opened(data, tmp_path / "a")
    assert Counter(photo.split for photo in splits.photos) == {"train": 30, "test": 12}
    assert (splits.is_drawn, splits.overlap) == (False, 0.0)
    assert opened(photos, tmp_path / "b").overlap == pytest.approx(0.3 / 0.55)


def test_duplicates_are_in_one_split(photos: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    originals = sorted((data / "disc").glob("*.png"))
    for photo in originals:
        shutil.copy(photo, photo.with_name(f"copy-{photo.name}"))
    split_of = {photo.path: photo.split for photo in read_split_csv(opened(data, tmp_path / "a").for_seed(0))}
    assert len(split_of) == 72 + 24
    for photo in originals:
        assert split_of[str(photo)] == split_of[str(photo.with_name(f"copy-{photo.name}"))]


@pytest.mark.parametrize(
    ("given", "there"),
    [(("train", "val"), {"val": "test"}), (("train", "val", "test"), {"val": "val", "test": "test"})],
)
def test_splits_of_data_are_kept(photos: Path, tmp_path: Path, given: tuple[str, ...], there: dict[str, str]) -> None:
    data = tmp_path / "data"
    for i, photo in enumerate(sorted(photos.glob("*/*.png"))):
        job = data / given[i % len(given)] / photo.parent.name
        job.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, job / photo.name)
    listed = list(read_split_csv(opened(data, tmp_path / "a").for_seed(0)))
    for photo in listed:
        was = Path(photo.path).parent.parent.name
        assert photo.split == there.get(was, photo.split)
        if was == "train":
            assert photo.split in (("train",) if "test" in given else ("train", "val"))
    assert {photo.split for photo in listed} == {"train", "val", "test"}


def test_quick_uses_some_of_many_photos_and_full_uses_all(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUICK_PHOTOS", 30)
    few = opened(photos, tmp_path / "a")
    assert Counter(photo.label for photo in few.photos) == {"disc": 10, "ring": 10, "stripes": 10}
    assert [p.path for p in opened(photos, tmp_path / "b").photos] == [p.path for p in few.photos]
    assert len(opened(photos, tmp_path / "a", quick=False)) == 72


def test_the_bundled_digits_are_the_default(tmp_path: Path) -> None:
    splits = opened(None, tmp_path)
    assert (len(splits), splits.classes, splits.kind, splits.name) == (1797, 10, "digits", "scikit-learn's digits")
    assert counts(splits, 0) == {"train": 972, "test": 539, "val": 286}


def test_photos_are_read_once_until_a_file_changes(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    first = opened(data, tmp_path / "a")
    looked: list[str] = []
    fingerprint = module.duplicates.fingerprint
    monkeypatch.setattr(module.duplicates, "fingerprint", lambda path, reader: looked.append(path) or fingerprint(path))
    assert opened(data, tmp_path / "a").photos == first.photos
    assert not looked
    changed = next((data / "disc").iterdir())
    changed.write_bytes(next((data / "ring").iterdir()).read_bytes())
    assert opened(data, tmp_path / "a").photos != first.photos
    assert len(looked) == 72


def test_photos_that_are_replaced_are_seen(photos: Path, tmp_path: Path) -> None:
    """A study that goes on would file what it measures on other photos under the content of the old ones."""
    data = Path(shutil.copytree(photos, tmp_path / "data"))
    before, photo = opened(data, tmp_path / "a").for_seed(0), data / "disc" / "disc000.png"
    key = Measurement(do=opened, split=before, seed=0, settings={}).key("cpu")  # type: ignore[arg-type]
    assert open_recorded_data(before).classes == ("disc", "ring", "stripes")
    shutil.copy(data / "ring" / "ring000.png", photo)
    with pytest.raises(DataError, match=rf"1 photo has other content \({photo}\)"):
        open_recorded_data(before)
    after = opened(data, tmp_path / "a").for_seed(0)
    open_recorded_data(after)
    assert Measurement(do=opened, split=after, seed=0, settings={}).key("cpu") != key  # type: ignore[arg-type]


def test_too_few_photos_are_refused_with_the_number_needed(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=rf"{photos.name} has 72 usable photos of 3 classes: this study needs 400 photos of 2 classes or more",
    ):
        opened(photos, tmp_path / "a", min_photos=400)
    few = tmp_path / "few"
    for label in ("disc", "ring"):
        (few / label).mkdir(parents=True)
        for photo in sorted((photos / label).iterdir())[: 20 if label == "disc" else 2]:
            shutil.copy(photo, few / label)
    problem = "few has too few photos of class 'ring': none fell to "
    with pytest.raises(DataError, match=re.escape(problem) + r"\w+: .* give 20 or more of each class"):
        for seed in range(20):
            opened(few, tmp_path / "b").for_seed(seed)


def test_photos_that_cannot_be_used_are_reported_each_time(photos: Path, tmp_path: Path, locked: str) -> None:
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    (data / "disc" / "broken.jpg").write_bytes(b"no picture")
    (data / "ring" / "gone.jpg").symlink_to(data / "unplugged")
    (data / "ring" / locked).mkdir()
    for _ in range(2):  # each time
        progress = NullProgress()
        splits = open_study_splits(data, quick=True, min_photos=10, folder=tmp_path / "a", progress=progress)
        assert len(splits) == 72
        for name in ("broken.jpg", "gone.jpg", f"ring/{locked}"):
            assert any(name in warning for warning in progress.warnings)


def test_photos_are_opened_as_the_study_says_and_what_is_found_is_reported_each_time(tmp_path: Path) -> None:
    for label, top in (("a", 200), ("b", 100)):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(6):
            values = np.random.default_rng(i).integers(0, top, (32, 32), dtype=np.uint16)
            Image.fromarray(values).save(tmp_path / "data" / label / f"{i}.png")
    Image.new("RGB", (200, 200)).save(tmp_path / "data" / "a" / "large.png")
    dark, small = PhotoReader(max_megapixels=0.03), PhotoReader((0, 255), max_megapixels=0.03)
    for reader, number in ((dark, 12), (dark, 12), (small, 12), (PhotoReader((0, 255)), 13)):
        progress = NullProgress()
        splits = open_study_splits(
            tmp_path / "data",
            quick=True,
            min_photos=10,
            folder=tmp_path / "s",
            progress=progress,
            reader=replace(reader, found=PhotoReader().found),
        )
        assert len(splits) == number
        assert any("large.png" in warning for warning in progress.warnings) == (number == 12)
        assert any("almost black" in warning for warning in progress.warnings) == (reader is dark)


def test_names_that_are_not_utf_8(photos: Path, tmp_path: Path) -> None:
    """Of a class, of files, and of the folder of DATA."""
    data = tmp_path / os.fsdecode(b"d\xe9")
    shutil.copytree(photos, data)
    (data / "ring").rename(data / os.fsdecode(b"ri\xe9ng"))
    photo = next((data / "disc").iterdir())
    photo.rename(photo.with_name(os.fsdecode(b"caf\xe9.png")))
    first, again = (opened(data, data / "a") for _ in range(2))
    assert (len(first), first.classes, first.name) == (72, 3, r"d\udce9")
    assert first.photos == again.photos
    digest = _photos_digest(first.for_seed(0), 0)
    shutil.rmtree(data / "a")
    (data / os.fsdecode(b"ri\xe9ng")).rename(data / os.fsdecode(b"ri\xe8ng"))
    assert _photos_digest(opened(data, data / "a").for_seed(0), 1) != digest


def test_small_classes_have_photos_in_each_split_of_each_seed(photos: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for photo in sorted(photos.glob("*/*0[0-3].png")):
        (data / photo.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, data / photo.parent.name)
    splits = opened(data, tmp_path / "a")
    for seed in range(10):
        listed = read_split_csv(splits.for_seed(seed))
        assert {(photo.label, photo.split) for photo in listed} == set(
            product(("disc", "ring", "stripes"), ("train", "val", "test"))
        )
