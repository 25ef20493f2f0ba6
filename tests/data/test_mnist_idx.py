import gzip
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bnlab.data.mnist_idx import find_pairs, read_idx, write_binary_digits
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
    pairs = find_pairs(mnist)
    assert [split for _, _, split in pairs] == ["test"]
    assert find_pairs(mnist / "t10k-labels-idx1-ubyte.gz") == pairs
    found = write_binary_digits(pairs, tmp_path / "out", NullProgress())
    assert [(Path(one.path).name, one.label, split) for one, split in found] == [
        ("00000.png", "3", ""), ("00002.png", "3", ""), ("00003.png", "3", ""),
        ("00001.png", "7", ""), ("00004.png", "7", ""), ("00005.png", "7", ""),
    ]  # fmt: skip
    pixels = np.asarray(Image.open(found[1][0].path))
    assert np.array_equal(pixels, np.where(IMAGES[2] > 127, 255, 0))
    before = Path(found[0][0].path).stat().st_mtime_ns
    assert write_binary_digits(pairs, tmp_path / "out", NullProgress()) == found
    assert Path(found[0][0].path).stat().st_mtime_ns == before  # written once


def test_train_and_test_keep_their_splits(mnist: Path, tmp_path: Path) -> None:
    (mnist / "train-images.idx3-ubyte").write_bytes(idx(IMAGES[:2]))  # as some unpackers name them
    (mnist / "train-labels.idx1-ubyte").write_bytes(idx(LABELS[:2]))
    splits = [split for _, split in write_binary_digits(find_pairs(mnist), tmp_path / "out", NullProgress())]
    assert splits == ["train"] * 2 + ["test"] * 6


def test_a_folder_without_them_has_none(tmp_path: Path) -> None:
    assert find_pairs(tmp_path) == []
    (tmp_path / "a.csv").touch()
    assert find_pairs(tmp_path / "a.csv") == []
    assert find_pairs(tmp_path / "not there") == []


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
        write_binary_digits(find_pairs(mnist), tmp_path / "out", NullProgress())
    (mnist / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-images.* has no file of labels: .*t10k-labels-idx1-ubyte.gz"):
        find_pairs(mnist)
