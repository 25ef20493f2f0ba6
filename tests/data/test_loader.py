import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import CLASSES

from bnlab.data.cache import Cache
from bnlab.data.loader import TrainingLoader, number_of_batches, prefetch_map, preprocessed_batches
from bnlab.data.photos import Photo
from bnlab.data.preprocess import Preprocessing, open_photo, preprocess
from bnlab.errors import PhotoError

VIEW = Preprocessing(size=32, resize="squash", crop_fraction=1.0, mean=(0, 0, 0), std=(1, 1, 1))


def listed(photos: Path) -> list[Photo]:
    return [Photo(str(p), p.parent.name, "train", "") for p in sorted(photos.rglob("*.png"))]


def loader(photos: list[Photo], **changes: object) -> TrainingLoader:
    options: dict[str, object] = {
        "side": 0, "area": (0.3, 1.0), "aspect": (0.75, 1.33), "flip": 0.5, "batch_size": 5, "seed": 0, "workers": 0,
    }  # fmt: skip
    return TrainingLoader(photos, CLASSES, **(options | changes))  # type: ignore[arg-type]


def content(one: TrainingLoader, epoch: int = 0, start: int = 0) -> list[tuple[bytes, list[int]]]:
    return [(pixels.tobytes(), labels.tolist()) for pixels, labels in one.epoch(epoch, 32, start)]


@given(st.integers(2, 500), st.integers(2, 64))
def test_batches_are_even_and_never_of_one(photos: int, batch_size: int) -> None:
    sizes = [len(part) for part in np.array_split(np.arange(photos), number_of_batches(photos, batch_size))]
    assert sum(sizes) == photos
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 2
    assert max(sizes) <= max(batch_size, 3)
    assert max(sizes) <= batch_size or batch_size == 2


def test_workers_change_nothing(photos: Path) -> None:
    """Whatever the number of threads, the batches are the same to the bit."""
    alone = content(loader(listed(photos), workers=0))
    assert len(alone) == 8
    assert alone == content(loader(listed(photos), workers=1)) == content(loader(listed(photos), workers=-1))


def test_a_cache_changes_nothing(photos: Path, tmp_path: Path) -> None:
    """In memory, on disk, too small for all, filled by threads: the batches are the same to the bit."""
    without = [content(loader(listed(photos), side=20), epoch) for epoch in (0, 1)]
    photo = 20 * 20 * 3
    for cache in (Cache(36, 10**8), Cache(36, 10**8, tmp_path), Cache(36, 10 * photo), Cache(36, 10 * photo, tmp_path)):
        one = loader(listed(photos), side=20, cache=cache, workers=3)
        assert [content(one, epoch) for epoch in (0, 1)] == without
        assert cache.used == min(cache.budget // photo, 36) * photo


def test_a_photo_is_decoded_once(photos: Path) -> None:
    one = loader(listed(photos), cache=Cache(36, 10**8))
    first = content(one)
    for path in one.paths:
        Path(path).unlink()
    assert content(one) == first


def test_batches_that_always_stand_together(photos: Path) -> None:
    """Only their order changes from one epoch to the next."""

    def together(epoch: int) -> list[tuple[int, ...]]:
        return [tuple(batch) for batch in loader(listed(photos), shuffle="batches")._order(epoch)]

    assert together(0) != together(1)
    assert sorted(together(0)) == sorted(together(1))
    assert sorted(i for batch in together(0) for i in batch) == list(range(36))


def test_a_sample_is_the_same_each_time(photos: Path) -> None:
    one = loader(listed(photos))
    assert one.sample(10).tolist() == one.sample(36)[:10].tolist()
    assert sorted(one.sample(1000).tolist()) == list(range(36))


def test_an_epoch_can_be_entered_anywhere(photos: Path) -> None:
    one = loader(listed(photos))
    assert content(one, epoch=2)[3:] == content(one, epoch=2, start=3)
    assert content(one, start=8) == []


def test_each_epoch_is_another_and_sees_all(photos: Path) -> None:
    one = loader(listed(photos))
    assert content(one, 0) == content(one, 0) != content(one, 1)
    labels = [label for _, batch in content(one) for label in batch]
    assert sorted(labels) == [0] * 12 + [1] * 12 + [2] * 12
    assert content(loader(listed(photos), seed=1)) != content(one, 0)


def test_a_photo_looks_the_same_in_whatever_batch(photos: Path) -> None:
    def by_photo(batch_size: int) -> np.ndarray:
        return np.concatenate([pixels for pixels, _ in loader(listed(photos), batch_size=batch_size).epoch(0, 32)])

    assert (by_photo(4) == by_photo(9)).all()


def test_classes_are_matched_by_name(photos: Path) -> None:
    backwards = TrainingLoader(
        listed(photos), CLASSES[::-1], side=0, area=(1, 1), aspect=(1, 1), flip=0, batch_size=36, seed=0, workers=0
    )
    ((_, labels),) = backwards.epoch(0, 32)
    ((_, usual),) = loader(listed(photos), batch_size=36).epoch(0, 32)
    assert (labels == 2 - usual).all()


def test_a_photo_that_breaks_later_is_named(photos: Path) -> None:
    one = loader(listed(photos), workers=2)
    (photos / "disc" / "disc003.png").write_text("text")
    with pytest.raises(PhotoError, match=r"disc003.png cannot be used, it is no picture Pillow can read: replace"):
        list(one.epoch(0, 32))


def test_prepared_batches_keep_order_and_errors(photos: Path) -> None:
    paths = [photo.path for photo in listed(photos)][:7]
    Path(paths[2]).write_text("text")
    batches = list(preprocessed_batches(paths, VIEW, batch_size=3, workers=2))
    errors = [error for _, some in batches for error in some]
    assert [error is not None for error in errors] == [i == 2 for i in range(7)]
    pixels = np.concatenate([some for some, _ in batches])
    expected = [preprocess(open_photo(path), VIEW) for i, path in enumerate(paths) if i != 2]
    assert (pixels == np.stack(expected)).all()


def test_in_order_runs_ahead_but_not_away() -> None:
    begun: list[int] = []

    def slow(item: int) -> int:
        begun.append(item)
        time.sleep(0.002 * (item % 3))
        return item

    results = prefetch_map(slow, range(100), 2)
    assert next(results) == 0
    assert len(begun) <= 8
    assert list(results) == list(range(1, 100))


def test_in_order_ends_with_its_reader() -> None:
    results = prefetch_map(lambda item: item, range(1000), 3)
    next(results)
    results.close()  # type: ignore[attr-defined]
