"""IDX files, as MNIST comes in: arrays of bytes with a short header, gzipped or not. (yann.lecun.com/exdb/mnist)

Header: two zero bytes, the type (8: unsigned byte), the number of dimensions; each dimension's length, 4 bytes, big
endian; then the values.
"""

import gzip
import hashlib
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bnlab.data.scan import PhotoFile
from bnlab.errors import DataError, printable
from bnlab.files import file_sha256, new_folder
from bnlab.progress import Progress

Pairs = Sequence[tuple[Path, Path, str]]
"""images, their labels, and the side they belong to: train or test"""
_STEMS = {"train": ("train", "train"), "t10k": ("t10k", "test")}
_MOST = 2**31  # bytes


def find_pairs(data: Path) -> list[tuple[Path, Path, str]]:
    """MNIST's files in a folder (or beside one of them), each of both halves that is there with its labels.

    Raises:
        DataError: there are images without labels.
    """
    data = data.parent if data.is_file() and "-ubyte" in data.name else data
    pairs = []
    for stem, side in _STEMS.values():
        images, labels = _file(data, f"{stem}-images", 3), _file(data, f"{stem}-labels", 1)
        if images and not labels:
            raise DataError(
                f"{printable(images)} has no labels beside it", f"put {stem}-labels-idx1-ubyte.gz into the same folder"
            )
        if images and labels:
            pairs.append((images, labels, side))
    return pairs


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array of a file, gzipped or not.

    Raises:
        DataError: it is no whole IDX file of bytes with so many dimensions.
    """
    name = printable(path)
    broken = "fetch it again"
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name} cannot be read ({error})", broken) from None
    head = 4 + 4 * dimensions
    if len(content) < head or content[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"{name} is no IDX file of bytes in {dimensions} dimensions", broken)
    shape = struct.unpack(f">{dimensions}I", content[4:head])
    if len(content) - head != np.prod(shape, dtype=np.int64) or len(content) > _MOST:
        raise DataError(f"{name} has {len(content) - head} values, not {' x '.join(map(str, shape))}", broken)
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def write_binary_digits(pairs: Pairs, folder: Path, progress: Progress) -> list[tuple[PhotoFile, str]]:
    """Write the digits as black and white PNGs below `folder`, once; where they are, and the side of each.

    Black and white, for the paper's input is "a 28x28 binary image" (sec. 4.1): a pixel of 128 or more is white. Where
    there is one half alone, its digits have no side of their own.

    Raises:
        DataError: a file is broken, or the labels are not of these images.
    """
    digest = hashlib.sha256("".join(file_sha256(path) for pair in pairs for path in pair[:2]).encode()).hexdigest()
    target = folder / f"idx-{digest[:16]}"
    if not target.is_dir():
        arrays = [(read_idx(images, 3), read_idx(labels, 1), side) for images, labels, side in pairs]
        for (images, labels, _), (path, _, _) in zip(arrays, pairs, strict=True):
            if len(images) != len(labels):
                raise DataError(
                    f"{printable(path)} has {len(images)} images and {len(labels)} labels", "fetch both again"
                )
        total = sum(len(labels) for _, labels, _ in arrays)
        with new_folder(target) as draft, progress.task("writing digits", total, "digits") as task:
            for images, labels, side in arrays:
                for label in np.unique(labels):
                    (draft / side / str(label)).mkdir(parents=True)
                for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                    pixels = np.where(image >= 128, 255, 0).astype(np.uint8)  # 28 x 28
                    Image.fromarray(pixels).save(draft / side / str(label) / f"{i:05d}.png")
                    task.advance()
    only = len(pairs) == 1
    return [
        (PhotoFile(str(path), path.parent.name), "" if only else side)
        for _, _, side in pairs
        for path in sorted((target / side).glob("*/*.png"))
    ]


def _file(folder: Path, stem: str, dimensions: int) -> Path | None:
    names = (f"{stem}{dot}idx{dimensions}-ubyte{end}" for dot in "-." for end in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)
