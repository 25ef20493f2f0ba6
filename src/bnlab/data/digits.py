"""Handwritten digits, written as folders of classes: scikit-learn's for the demo, and those of MNIST's IDX files.

An IDX file is an array of bytes with a short header, gzipped or not. The header is two zero bytes, the type (8:
unsigned byte), the number of dimensions, and the length of each dimension in 4 bytes, big endian. The values follow.
(yann.lecun.com/exdb/mnist)
"""

import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bnlab.data.photos import Photo
from bnlab.errors import DataError, printable
from bnlab.files import file_sha256, new_folder
from bnlab.progress import Progress


def write_digits(folder: Path) -> int:
    """Write the 1,797 digits as 8 x 8 grey PNGs into `folder/0` .. `folder/9`, and return their number.

    Source: the UCI ML hand-written digits (Alpaydin & Kaynak 1998), as in sklearn.datasets.load_digits.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    with new_folder(folder) as draft:
        for label in range(10):
            (draft / str(label)).mkdir()
        for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            pixels = np.round(image * (255 / 16)).astype(np.uint8)  # 8 x 8; from 0..16 to 0..255
            Image.fromarray(pixels).save(draft / str(label) / f"{i:04d}.png")
    return len(digits.target)


def find_idx_files(data: Path) -> list[tuple[Path, Path, str]]:
    """The (images, labels, split) files of MNIST in a folder, or in the folder of one of them; split is train or test.

    Raises:
        DataError: a file of images has no file of labels.
    """
    folder = data.parent if data.is_file() and "-ubyte" in data.name else data
    pairs = []
    for stem, split in (("train", "train"), ("t10k", "test")):
        images, labels = _find_file(folder, f"{stem}-images", 3), _find_file(folder, f"{stem}-labels", 1)
        if images and not labels:
            raise DataError(
                f"{printable(images)} has no file of labels", f"add {stem}-labels-idx1-ubyte.gz to the same folder"
            )
        if images and labels:
            pairs.append((images, labels, split))
    return pairs


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array in an IDX file, gzipped or not.

    Raises:
        DataError: it is not a complete IDX file of bytes with this number of dimensions.
    """
    name, remedy = printable(path), "download it again"
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name} cannot be read ({error})", remedy) from None
    head = 4 + 4 * dimensions
    if len(content) < head or content[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"{name} is not an IDX file of bytes in {dimensions} dimensions", remedy)
    shape = struct.unpack(f">{dimensions}I", content[4:head])
    if len(content) - head != math.prod(shape):
        raise DataError(f"{name} has {len(content) - head} values, not {' x '.join(map(str, shape))}", remedy)
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def write_binary_digits(files: Sequence[tuple[Path, Path, str]], folder: Path, progress: Progress) -> list[Photo]:
    """Write the digits of `find_idx_files` as black and white PNGs below `folder`, once.

    A pixel of 128 or more becomes white, because the paper's input is "a 28x28 binary image" (sec. 4.1). The digits of
    train alone, or of test alone, are not assigned to a split.

    Raises:
        DataError: a file is broken, or its numbers of images and labels differ.
    """
    digest = hashlib.sha256("".join(file_sha256(path) for pair in files for path in pair[:2]).encode()).hexdigest()
    target = folder / f"idx-{digest[:16]}"
    if not target.is_dir():
        arrays = [(read_idx(images, 3), read_idx(labels, 1), split) for images, labels, split in files]
        for (images, labels, _), (path, _, _) in zip(arrays, files, strict=True):
            if len(images) != len(labels):
                raise DataError(
                    f"{printable(path)} has {len(images)} images and {len(labels)} labels", "download both again"
                )
        total = sum(len(labels) for _, labels, _ in arrays)
        with new_folder(target) as draft, progress.task("writing digits", total, "digits") as task:
            for images, labels, split in arrays:
                for label in np.unique(labels):
                    (draft / split / str(label)).mkdir(parents=True)
                for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                    pixels = np.where(image >= 128, 255, 0).astype(np.uint8)  # 28 x 28
                    Image.fromarray(pixels).save(draft / split / str(label) / f"{i:05d}.png")
                    task.advance()
    return [
        Photo(str(path), path.parent.name, split if len(files) > 1 else "")
        for _, _, split in files
        for path in sorted((target / split).glob("*/*.png"))
    ]


def _find_file(folder: Path, stem: str, dimensions: int) -> Path | None:
    names = (f"{stem}{dot}idx{dimensions}-ubyte{end}" for dot in "-." for end in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)
