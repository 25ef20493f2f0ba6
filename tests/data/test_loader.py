import threading
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bnlab.data.augment import augment
from bnlab.data.cache import Cache
from bnlab.data.loader import TrainingLoader, number_of_batches, prefetch_map, preprocessed_batches
from bnlab.data.photo_file import PhotoReader, open_photo
from bnlab.data.photos import Photo
from bnlab.data.preprocess import Preprocessing, preprocess, tta_crops
from bnlab.errors import PhotoError, UsageError
from tests.conftest import CLASSES

PREPROCESSING = Preprocessing(size=32, resize="squash", crop_fraction=1.0, mean=(0, 0, 0), std=(1, 1, 1))
NOTHING_RANDOM = partial(augment, area=(1.0, 1.0), aspect=(1.0, 1.0), flip=0.0)


def photos_of(folder: Path) -> list[Photo]:
    return [Photo(str(p), p.parent.name, "train", "") for p in sorted(folder.rglob("*.png"))]


def loader(folder: Path, **changes: Any) -> TrainingLoader:
    defaults: dict[str, Any] = {
        "classes": CLASSES, "short_side": 0, "batch_size": 5, "seed": 0, "workers": 0,
        "augment": partial(augment, area=(0.3, 1.0), aspect=(0.75, 1.33), flip=0.5),
    }  # fmt: skip
    return TrainingLoader(photos_of(folder), **(defaults | changes))


def content(one: TrainingLoader, epoch: int = 0, start: int = 0) -> list[tuple[bytes, list[int]]]:
    return [(pixels.tobytes(), labels.tolist()) for pixels, labels in one.epoch(epoch, 32, start)]


@given(st.integers(2, 500), st.integers(2, 64))
def test_batches_are_even_and_never_of_one_photo(photos: int, batch_size: int) -> None:
    sizes = [len(part) for part in np.array_split(np.arange(photos), number_of_batches(photos, batch_size))]
    assert sum(sizes) == photos
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 2
    assert max(sizes) <= max(batch_size, 3)
    assert max(sizes) <= batch_size or batch_size == 2


def test_the_number_of_workers_changes_nothing(photos: Path) -> None:
    alone = content(loader(photos, workers=0))
    assert len(alone) == 8
    assert alone == content(loader(photos, workers=1)) == content(loader(photos, workers=-1))


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("kept", [36, 10])
def test_a_cache_changes_nothing(photos: Path, tmp_path: Path, kept: int, on_disk: bool) -> None:
    """A cache in memory or on disk, large enough or not, filled by threads, gives the same batches to the bit."""
    expected = [content(loader(photos, short_side=20), epoch) for epoch in (0, 1)]
    cache = Cache(36, kept * 20 * 20 * 3, tmp_path if on_disk else None)
    one = loader(photos, short_side=20, cache=cache, workers=3)
    assert [content(one, epoch) for epoch in (0, 1)] == expected
    assert cache.used == cache.budget


def test_a_cached_photo_is_decoded_once(photos: Path) -> None:
    one = loader(photos, cache=Cache(36, 10**8))
    first = content(one)
    for path in one.paths:
        Path(path).unlink()
    assert content(one) == first


def test_shuffling_batches_keeps_photos_together(photos: Path) -> None:
    """Only the order of the batches changes from one epoch to the next."""
    one = loader(photos, shuffle="batches", augment=NOTHING_RANDOM)
    first, second = content(one, 0), content(one, 1)
    assert first != second
    assert sorted(first) == sorted(second)
    mixed = loader(photos, shuffle="photos", augment=NOTHING_RANDOM)
    assert sorted(content(mixed, 0)) != sorted(content(mixed, 1))


def test_a_sample_is_the_same_at_each_call(photos: Path) -> None:
    one = loader(photos)
    assert one.sample(10).tolist() == one.sample(36)[:10].tolist()
    assert sorted(one.sample(1000).tolist()) == list(range(36))


def test_an_epoch_can_start_at_any_batch(photos: Path) -> None:
    one = loader(photos)
    assert content(one, epoch=2)[3:] == content(one, epoch=2, start=3)
    assert content(one, start=8) == []


def test_epochs_and_seeds_differ_and_an_epoch_has_all_photos(photos: Path) -> None:
    one = loader(photos)
    assert content(one, 0) == content(one, 0) != content(one, 1)
    labels = [label for _, batch in content(one) for label in batch]
    assert sorted(labels) == [0] * 12 + [1] * 12 + [2] * 12
    assert content(loader(photos, seed=1)) != content(one, 0)


def test_the_augmentation_of_a_photo_does_not_depend_on_the_batch_size(photos: Path) -> None:
    def all_pixels(batch_size: int) -> np.ndarray:
        return np.concatenate([pixels for pixels, _ in loader(photos, batch_size=batch_size).epoch(0, 32)])

    assert (all_pixels(4) == all_pixels(9)).all()


def test_classes_are_matched_by_name(photos: Path) -> None:
    ((_, labels),) = loader(photos, batch_size=36).epoch(0, 32)
    ((_, backwards),) = loader(photos, batch_size=36, classes=CLASSES[::-1]).epoch(0, 32)
    assert (backwards == 2 - labels).all()


def test_a_photo_that_breaks_during_training_is_named(photos: Path) -> None:
    one = loader(photos, workers=2)
    (photos / "disc" / "disc003.png").write_text("text")
    with pytest.raises(PhotoError, match=r"disc003.png cannot be used"):
        list(one.epoch(0, 32))


@pytest.mark.parametrize("workers", [0, 2])
def test_preprocessed_batches_keep_the_order_and_carry_errors(photos: Path, workers: int) -> None:
    paths = [photo.path for photo in photos_of(photos)][:7]
    for broken in (2, 6):
        Path(paths[broken]).write_text("text")
    batches = list(preprocessed_batches(paths, PREPROCESSING, batch_size=3, workers=workers))
    assert [len(errors) for _, errors in batches] == [3, 3, 1]
    errors = [error for _, some in batches for error in some]
    assert [error.path if error else None for error in errors] == [None, None, paths[2], None, None, None, paths[6]]
    pixels = np.concatenate([some for some, _ in batches])
    expected = [preprocess(open_photo(path), PREPROCESSING) for i, path in enumerate(paths) if i not in (2, 6)]
    assert (pixels == np.stack(expected)).all()


def test_preprocessed_batches_of_crops(photos: Path) -> None:
    """A batch has no more images than `batch_size`, unless a single photo has; the crops of a photo stay together."""
    paths = [photo.path for photo in photos_of(photos)][:5]
    expected = np.concatenate([tta_crops(open_photo(path), PREPROCESSING, 10) for path in paths])
    cache = Cache(5, 10**7)
    for batch_size, sizes in ((10, [10, 10, 5]), (4, [5] * 5), (64, [25])):
        options: dict[str, Any] = {"batch_size": batch_size, "workers": 2, "cache": cache, "crops": 10}
        batches = [pixels for pixels, _ in preprocessed_batches(paths, PREPROCESSING, **options)]
        assert [len(pixels) for pixels in batches] == sizes
        assert (np.concatenate(batches) == expected).all()
    assert cache.is_full
    with pytest.raises(UsageError, match="crops 7"):
        next(preprocessed_batches(paths, PREPROCESSING, batch_size=4, workers=0, crops=7))  # type: ignore[arg-type]


def test_prefetching_runs_ahead_and_stays_in_order() -> None:
    """With 2 workers and 4 items ahead, the 7th item is made before the second result is asked for, and no 8th."""
    begun = [threading.Event() for _ in range(100)]

    def make(item: int) -> int:
        begun[item].set()
        return item

    results = prefetch_map(make, range(100), 2, ahead=4)
    assert next(results) == 0
    assert begun[6].wait(timeout=60)
    assert not any(event.is_set() for event in begun[7:])
    assert list(results) == list(range(1, 100))


@pytest.mark.parametrize("workers", [0, 3])
def test_prefetching_ends_when_its_reader_stops(workers: int) -> None:
    begun: list[int] = []
    results = prefetch_map(begun.append, count(), workers)
    next(results)
    results.close()
    assert 1 <= len(begun) <= 1 + workers + 4
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bnlab-loader")]


def test_training_and_evaluation_see_a_picture_in_the_same_range(tmp_path: Path) -> None:
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 65
    (tmp_path / CLASSES[0]).mkdir()
    Image.fromarray(values).save(tmp_path / CLASSES[0] / "a.png")
    path = str(tmp_path / CLASSES[0] / "a.png")
    training = loader(tmp_path, reader=PhotoReader((0, 4095))).photo(0)
    assert (training[..., 0] == np.round(values / 4095 * 255)).all()
    ((evaluation, _),) = preprocessed_batches(
        [path], replace(PREPROCESSING, size=8, pixel_range=(0, 4095)), batch_size=1, workers=0
    )
    assert (evaluation[0] == training).all()
