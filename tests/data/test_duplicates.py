import time
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from tests.conftest import picture

from bnlab.data.duplicates import MAX_BITS, MAX_DIFFERENCE, Fingerprint, find_groups, fingerprint


def landscape(seed: int = 0) -> Image.Image:
    """Soft blobs, as photos have them."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    return small.resize((320, 240), Image.Resampling.BICUBIC)


def found(folder: Path, images: dict[str, Image.Image], **options: object) -> list[tuple[list[str], bool]]:
    names = list(images)
    for name, image in images.items():
        image.save(folder / name, **options)
    prints = [fingerprint(str(folder / name)) for name in names]
    return [([names[i] for i in group.members], group.exact) for group in find_groups(prints)]


def test_identical_files_are_exact(tmp_path: Path) -> None:
    assert found(tmp_path, {"a.png": landscape(0), "b.png": landscape(1), "c.png": landscape(0)}) == [
        (["a.png", "c.png"], True)
    ]


def test_edited_copies_are_near(tmp_path: Path) -> None:
    image = landscape()
    copies = {
        "original.png": image,
        "other.png": landscape(7),
        "smaller.png": image.resize((160, 120)),
        "compressed.jpg": image,
        "darker.png": ImageEnhance.Brightness(image).enhance(0.93),
    }
    assert found(tmp_path, copies) == [(["original.png", "smaller.png", "compressed.jpg", "darker.png"], False)]


def test_mere_likeness_is_not_enough(tmp_path: Path) -> None:
    """Two flat colours have hashes as alike as can be, and are not one photo."""
    flat = {"red.png": Image.new("RGB", (64, 64), "red"), "blue.png": Image.new("RGB", (64, 64), "blue")}
    shapes = {f"{label}{i}.png": picture(label, i) for label in ("disc", "ring", "stripes") for i in range(20)}
    assert found(tmp_path, flat | shapes) == []


@given(st.integers(0, 2**32))
@settings(max_examples=30)
def test_the_quick_search_finds_what_the_obvious_one_finds(seed: int) -> None:
    random = np.random.default_rng(seed)
    base = random.integers(0, 2, (6, 64))
    bits = base[random.integers(0, 6, 60)] ^ (random.random((60, 64)) < 0.08)
    colours = random.integers(0, 30, (60, 192), dtype=np.uint8)
    prints = [
        Fingerprint(str(i), int("".join(map(str, row)), 2), colour.tobytes())
        for i, (row, colour) in enumerate(zip(bits, colours, strict=True))
    ]

    def near(i: int, j: int) -> bool:
        difference = np.abs(colours[i].astype(int) - colours[j]).mean()
        return bool((bits[i] != bits[j]).sum() <= MAX_BITS and difference <= MAX_DIFFERENCE)

    pairs = np.array([[near(i, j) for j in range(60)] for i in range(60)])
    _, number = connected_components(csr_matrix(pairs))
    expected = [tuple(np.flatnonzero(number == n)) for n in np.unique(number) if (number == n).sum() > 1]
    assert sorted(group.members for group in find_groups(prints)) == sorted(expected)


def test_ten_thousand_frames_of_one_film_do_not_take_their_square() -> None:
    prints = [Fingerprint(str(i), 12345 + (i & 1), bytes(range(192))) for i in range(10_000)]
    began = time.perf_counter()
    (group,) = find_groups(prints)
    assert len(group.members) == 10_000
    assert time.perf_counter() - began < 20


def test_chains_are_one_group() -> None:
    prints = [
        Fingerprint(str(i), (1 << (5 * i)) - 1, bytes(range(192))) for i in range(4)
    ]  # 5 bits apart, and 10, and 15
    assert [group.members for group in find_groups(prints)] == [(0, 1, 2, 3)]


def test_flat_pictures_are_alike_only_to_the_byte(tmp_path: Path) -> None:
    black = {"a.png": Image.new("RGB", (1, 1)), "b.png": Image.new("RGB", (500, 3)), "c.png": Image.new("RGB", (1, 1))}
    assert found(tmp_path, black) == [(["a.png", "c.png"], True)]


def test_no_photos_have_no_duplicates() -> None:
    assert find_groups([]) == []
