import threading
from pathlib import Path

import numpy as np
import pytest

from bnlab.data import cache as module
from bnlab.data.cache import Cache, choose_cache

Photos = list[np.ndarray]


@pytest.fixture
def photos() -> Photos:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*random.integers(1, 40, 2), 3), dtype=np.uint8) for _ in range(50)]


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_was_put_comes_back(
    photos: Photos, tmp_path: Path, on_disk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 10_000)  # a photo has at most 4,563 bytes, so chunks end between them
    cache = Cache(60, 10**9, tmp_path if on_disk else None)
    for i in np.random.default_rng(1).permutation(50):
        cache.put(int(i), photos[i])
        cache.put(int(i), photos[i] * 0)  # there already
    assert all((cache.get(i) == photo).all() for i, photo in enumerate(photos))
    assert all(cache.get(i) is None for i in range(50, 60))
    assert cache.used == sum(photo.nbytes for photo in photos)


@pytest.mark.parametrize("on_disk", [False, True])
def test_no_more_is_kept_than_the_budget(photos: Photos, tmp_path: Path, on_disk: bool) -> None:
    cache = Cache(50, 20_000, tmp_path if on_disk else None)
    for i, photo in enumerate(photos):
        cache.put(i, photo)
    kept = [i for i in range(50) if cache.get(i) is not None]
    assert sum(photos[i].nbytes for i in kept) == cache.used <= 20_000
    assert cache.used > 15_000
    none = Cache(50, 0, tmp_path if on_disk else None)
    none.put(0, photos[0])
    assert none.get(0) is None
    assert not none.is_full
    assert all((cache.get(i) == photos[i]).all() for i in kept)


def test_a_photo_larger_than_a_chunk_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 100)
    cache = Cache(1, 10**9)
    cache.put(0, np.zeros((6, 6, 3), dtype=np.uint8))
    assert cache.get(0) is None


@pytest.mark.parametrize("on_disk", [False, True])
def test_many_threads_may_use_it(photos: Photos, tmp_path: Path, on_disk: bool) -> None:
    cache = Cache(50, 10**9, tmp_path if on_disk else None)
    wrong: list[int] = []

    def use(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 50, 500):
            kept = cache.get(int(i))
            if kept is None:
                cache.put(int(i), photos[i])
            elif kept.shape != photos[i].shape or (kept != photos[i]).any():
                wrong.append(int(i))

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_file_leaves_nothing_behind(tmp_path: Path, photos: Photos) -> None:
    cache = Cache(50, 10**9, tmp_path)
    cache.put(0, photos[0])
    del cache
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_is_left_alone(photos: Photos, tmp_path: Path) -> None:
    """A cache is worth no training: what it cannot keep or give is decoded again."""
    if not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    cache = Cache(50, 10**9, tmp_path)
    cache.put(1, photos[1])
    cache._place.file.close()  # type: ignore[union-attr]
    with Path("/dev/full").open("r+b", buffering=0) as full:
        cache._place.file = full  # type: ignore[union-attr]
        cache.put(0, photos[0])
        assert cache.get(0) is None
        assert cache.budget == cache.used == photos[1].nbytes
    cut = tmp_path / "cut"
    cut.write_bytes(b"short")
    with cut.open("r+b", buffering=0) as file:
        cache._place.file = file  # type: ignore[union-attr]
        assert cache.get(1) is None
    cache._place.file = None  # type: ignore[union-attr]


def test_auto_takes_the_disk_where_memory_is_too_small(tmp_path: Path) -> None:
    def place(mode: str, memory: int, disk: int) -> tuple[bool, int]:
        cache = choose_cache(mode, 100, memory=memory, disk=disk, estimate=10, folder=tmp_path)
        return isinstance(cache._place, module._File), cache.budget

    assert place("auto", 1000, 9000) == (False, 1000)
    assert place("auto", 999, 9000) == (True, 9000)
    assert place("auto", 900, 800) == (False, 900)  # neither holds all: the larger
    assert place("ram", 1, 9000) == (False, 1)
    assert place("disk", 9000, 1) == (True, 1)
    assert place("none", 9000, 9000)[1] == 0
