import io
import threading
from pathlib import Path
from typing import Any

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
def test_cached_photos_are_unchanged(
    photos: Photos, tmp_path: Path, on_disk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 10_000)  # a photo has at most 4,563 bytes, so chunks end between them
    cache = Cache(60, 10**9, tmp_path if on_disk else None)
    for i in np.random.default_rng(1).permutation(50):
        cache.put(int(i), photos[i])
        cache.put(int(i), photos[i] * 0)  # is already cached
    assert all((cache.get(i) == photo).all() for i, photo in enumerate(photos))
    assert all(cache.get(i) is None for i in range(50, 60))
    assert cache.used == sum(photo.nbytes for photo in photos)


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_budget_is_not_exceeded(photos: Photos, tmp_path: Path, on_disk: bool) -> None:
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
def test_threads_may_share_a_cache(photos: Photos, tmp_path: Path, on_disk: bool) -> None:
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


def test_the_file_is_deleted_with_the_cache(tmp_path: Path, photos: Photos) -> None:
    cache = Cache(50, 10**9, tmp_path)
    cache.put(0, photos[0])
    del cache
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails", ["write", "short write", "read", "short read"])
def test_a_disk_that_fails_costs_no_photo(
    photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """Photos that cannot be written or read are not cached, and nothing is written after a failed write."""
    broken = False

    class File(io.BytesIO):
        def write(self, values: Any) -> int:
            if broken and fails == "write":
                raise OSError("broken")
            return super().write(values[:1] if broken and fails == "short write" else values)

        def readinto(self, values: Any) -> int:
            if broken and fails == "read":
                raise OSError("broken")
            return super().readinto(values[:1] if broken and fails == "short read" else values)

    monkeypatch.setattr(module.tempfile, "TemporaryFile", lambda **_: File())
    cache = Cache(50, 10**9, tmp_path)
    cache.put(1, photos[1])
    assert (cache.get(1) == photos[1]).all()
    broken = True
    cache.put(0, photos[0])
    if "write" in fails:
        assert cache.get(0) is None
        assert cache.budget == cache.used == photos[1].nbytes
        broken = False
        cache.put(2, photos[2])
        assert cache.get(2) is None
        assert (cache.get(1) == photos[1]).all()
    else:
        assert cache.get(1) is None


@pytest.mark.parametrize(
    ("mode", "memory", "disk", "expected"),
    [
        ("auto", 1000, 9000, 1000),
        ("auto", 999, 9000, 9000),
        ("auto", 900, 800, 900),  # neither is large enough for all: the larger
        ("ram", 1, 9000, 1),
        ("disk", 9000, 1, 1),
        ("none", 9000, 9000, 0),
    ],
)
def test_auto_uses_the_disk_if_memory_is_too_small(
    tmp_path: Path, mode: str, memory: int, disk: int, expected: int
) -> None:
    cache = choose_cache(mode, 100, memory=memory, disk=disk, estimate=10, folder=tmp_path)
    assert cache.budget == expected  # that of the memory or of the disk
