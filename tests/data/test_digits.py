import gzip
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from bnlab.data.digits import find_idx_files, read_idx, write_binary_digits, write_digits
from bnlab.errors import DataError
from bnlab.progress import NullProgress

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
LABELS = np.array([3, 7, 3, 3, 7, 7], dtype=np.uint8)


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    folder = tmp_path / "mnist"
    folder.mkdir()
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(IMAGES)))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS)))
    return folder


def test_digits_become_black_and_white_images(mnist: Path, tmp_path: Path) -> None:
    files = find_idx_files(mnist)
    assert [split for _, _, split in files] == ["test"]
    assert find_idx_files(mnist / "t10k-labels-idx1-ubyte.gz") == files
    found = write_binary_digits(files, tmp_path / "out", NullProgress())
    assert [(Path(photo.path).name, photo.label, photo.split) for photo in found] == [
        ("00000.png", "3", ""), ("00002.png", "3", ""), ("00003.png", "3", ""),
        ("00001.png", "7", ""), ("00004.png", "7", ""), ("00005.png", "7", ""),
    ]  # fmt: skip
    pixels = np.asarray(Image.open(found[1].path))
    assert np.array_equal(pixels, np.where(IMAGES[2] > 127, 255, 0))
    before = Path(found[0].path).stat().st_mtime_ns
    assert write_binary_digits(files, tmp_path / "out", NullProgress()) == found
    assert Path(found[0].path).stat().st_mtime_ns == before  # written once


def test_train_and_test_keep_their_splits(mnist: Path, tmp_path: Path) -> None:
    (mnist / "train-images.idx3-ubyte").write_bytes(idx(IMAGES[:2]))  # as some unpackers name them
    (mnist / "train-labels.idx1-ubyte").write_bytes(idx(LABELS[:2]))
    found = write_binary_digits(find_idx_files(mnist), tmp_path / "out", NullProgress())
    assert [photo.split for photo in found] == ["train"] * 2 + ["test"] * 6


def test_a_folder_without_them_has_none(tmp_path: Path) -> None:
    assert find_idx_files(tmp_path) == []
    (tmp_path / "a.csv").touch()
    assert find_idx_files(tmp_path / "a.csv") == []
    assert find_idx_files(tmp_path / "not there") == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is not an IDX file of bytes in 3 dimensions"),
        (idx(LABELS), "is not an IDX file of bytes in 3 dimensions"),
        (idx(IMAGES)[:-1], "has 4703 values, not 6 x 28 x 28"),
        (gzip.compress(idx(IMAGES))[:-9], "cannot be read (Compressed file ended before"),
        (b"\x1f\x8bnonsense", "cannot be read ("),
        (bytes((0, 0, 8, 3)) + b"\xff" * 12, "has 0 values, not 4294967295 x 4294967295 x 4294967295"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(problem)):
        read_idx(path, 3)


def test_missing_and_too_few_labels_are_refused(mnist: Path, tmp_path: Path) -> None:
    (mnist / "t10k-labels-idx1-ubyte.gz").write_bytes(idx(LABELS[:4]))
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte.gz has 6 images and 4 labels"):
        write_binary_digits(find_idx_files(mnist), tmp_path / "out", NullProgress())
    (mnist / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-images.* has no file of labels: .*t10k-labels-idx1-ubyte.gz"):
        find_idx_files(mnist)


def test_digits_are_scikit_learns(tmp_path: Path) -> None:
    assert write_digits(tmp_path / "digits") == 1797
    assert sorted(p.name for p in (tmp_path / "digits").iterdir()) == list("0123456789")
    assert len(list((tmp_path / "digits").rglob("*.png"))) == 1797
    digits = load_digits()
    path = tmp_path / "digits" / str(digits.target[123]) / "0123.png"
    assert np.abs(np.asarray(Image.open(path)) / 255 * 16 - digits.images[123]).max() < 0.04
