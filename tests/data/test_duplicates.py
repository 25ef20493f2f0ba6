import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import imagehash
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from bnlab.data.duplicates import (
    MAX_BITS,
    MAX_DIFFERENCE,
    Fingerprint,
    find_groups,
    fingerprint,
    group_keys,
    perceptual_hash,
    read_fingerprints,
)
from bnlab.data.photo_file import PhotoReader
from bnlab.data.photos import Photo
from bnlab.progress import NullProgress
from tests.conftest import picture


def landscape(seed: int = 0) -> Image.Image:
    """Soft blobs, as in photos."""
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


def test_images_that_are_only_similar_are_no_duplicates(tmp_path: Path) -> None:
    """Two flat colours have the same hash and are not the same photo."""
    flat = {"red.png": Image.new("RGB", (64, 64), "red"), "blue.png": Image.new("RGB", (64, 64), "blue")}
    shapes = {f"{label}{i}.png": picture(label, i) for label in ("disc", "ring", "stripes") for i in range(20)}
    assert found(tmp_path, flat | shapes) == []


@given(st.integers(0, 2**32))
@settings(max_examples=15)
def test_the_fast_search_finds_what_a_comparison_of_all_pairs_finds(seed: int) -> None:
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


def test_thousands_of_frames_of_one_film_are_one_group() -> None:
    prints = [Fingerprint(str(i), 12345 + (i & 1), bytes(range(192))) for i in range(3000)]
    (group,) = find_groups(prints)
    assert len(group.members) == 3000


def test_chains_are_one_group() -> None:
    prints = [
        Fingerprint(str(i), (1 << (5 * i)) - 1, bytes(range(192))) for i in range(4)
    ]  # 5 bits apart, and 10, and 15
    assert [group.members for group in find_groups(prints)] == [(0, 1, 2, 3)]


def test_flat_images_are_duplicates_only_if_their_files_are(tmp_path: Path) -> None:
    black = {"a.png": Image.new("RGB", (1, 1)), "b.png": Image.new("RGB", (500, 3)), "c.png": Image.new("RGB", (1, 1))}
    assert found(tmp_path, black) == [(["a.png", "c.png"], True)]


def test_no_photos_have_no_duplicates() -> None:
    assert find_groups([]) == []


def test_a_group_has_the_key_of_its_smallest_sha256() -> None:
    prints = [Fingerprint(sha256, phash, bytes(range(192))) for sha256, phash in (("c", 1), ("b", 2**40 - 1), ("a", 1))]
    groups = find_groups(prints)
    assert [group.members for group in groups] == [(0, 2)]
    assert group_keys(prints, groups) == ["a", "b", "a"]


def test_photos_that_cannot_be_used_have_no_fingerprint(tmp_path: Path) -> None:
    landscape().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("text")
    files = [Photo(str(tmp_path / name), "x") for name in ("b.png", "a.png")]
    usable, refused = read_fingerprints(files, NullProgress())
    assert usable == [(files[1], fingerprint(files[1].path))]
    assert [(refusal.path, refusal.label) for refusal in refused] == [(files[0].path, "x")]


def images(kind: str) -> Iterator[Image.Image]:
    random = np.random.default_rng(0)
    for number in range(150):
        match kind:
            case "landscape":
                yield landscape(number)
            case "shape":
                yield picture("ring", number)
            case "noise":
                yield Image.fromarray(random.integers(0, 256, (*random.integers(1, 60, 2), 3), dtype=np.uint8))
            case "flat":
                yield Image.new("RGB", (40, 30), (number, number, number))
            case "stripes":
                yield Image.fromarray(random.integers(0, 256, (1, 40, 3), dtype=np.uint8)).resize((40, 40))
            case "symmetric":
                half = random.integers(0, 256, (40, 20, 3), dtype=np.uint8)
                yield Image.fromarray(np.concatenate([half, half[:, ::-1]], axis=1))
            case "box":
                image = Image.new("RGB", (32, 32))
                image.paste((255, 255, 255), (number % 20, number % 17, number % 20 + 6, number % 17 + 9))
                yield image


@pytest.mark.parametrize("kind", ["landscape", "shape", "noise", "flat", "stripes", "symmetric", "box"])
def test_the_perceptual_hash_is_that_of_imagehash(kind: str) -> None:
    """Bit for bit, also where rounding decides, as in flat and symmetric images."""
    number = 0
    for image in images(kind):
        assert (perceptual_hash(image) == imagehash.phash(image).hash.ravel()).all()
        number += 1
    assert number == 150


def test_the_hash_of_a_photo_needs_neither_scipy_nor_torch(tmp_path: Path) -> None:
    landscape().save(tmp_path / "a.png")
    code = (
        "import sys; from bnlab.data.split import split_folder; from bnlab.data.duplicates import fingerprint; "
        f"fingerprint({str(tmp_path / 'a.png')!r}); "
        "print([name for name in ('scipy', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_pictures_of_12_bits_without_a_range_are_compared_all_the_same(tmp_path: Path) -> None:
    """By 0 to 65535 all of them would be flat, and only identical files would be found."""
    for number in range(3):
        values = np.asarray(landscape(number).convert("L")).astype(np.uint16) * 16
        Image.fromarray(values).save(tmp_path / f"{number}.png")
        Image.fromarray(values + 1).save(tmp_path / f"{number}-near.tif")
    names = sorted(path.name for path in tmp_path.iterdir())
    prints = [fingerprint(str(tmp_path / name)) for name in names]
    groups = {tuple(names[i] for i in group.members) for group in find_groups(prints)}
    assert groups == {(f"{number}-near.tif", f"{number}.png") for number in range(3)}


def test_fingerprints_are_read_with_the_settings_of_the_reader(tmp_path: Path) -> None:
    Image.fromarray(np.asarray(landscape().convert("F")) / 255).save(tmp_path / "a.tif")
    landscape().save(tmp_path / "b.png")
    files = [Photo(str(tmp_path / name), "class") for name in ("a.tif", "b.png")]
    usable, refused = read_fingerprints(files, NullProgress())
    assert [photo.path for photo, _ in usable] == [files[1].path]
    assert "no pixel_range" in refused[0].reason
    both, _ = read_fingerprints(files, NullProgress(), PhotoReader((0, 1)))
    assert len(both) == 2
    assert read_fingerprints(files, NullProgress(), PhotoReader((0, 1), 0.01))[0] == []
