"""Picture files that Pillow reads and does not write, byte by byte."""

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Formats of the types of TIFF's tags: BYTE, ASCII, SHORT, LONG, RATIONAL, ..., SRATIONAL, FLOAT, DOUBLE.
TYPES = {1: "B", 2: "c", 3: "H", 4: "I", 5: "I", 6: "b", 7: "B", 8: "h", 9: "i", 10: "i", 11: "f", 12: "d"}
Tag = tuple[int, Sequence[Any]]
"""Type of a tag, and its values; of a rational number both parts."""


def directory(tags: Mapping[int, Tag], order: str = "<", data: bytes = b"") -> bytes:
    """A TIFF header with one directory, which is what EXIF is, and pixel data at the offset that tag 273 gets."""
    entries, beyond = b"", b""
    end = 8 + 2 + 12 * len(tags) + 4
    packed = {tag: struct.pack(f"{order}{len(v)}{TYPES[kind]}", *v) for tag, (kind, v) in sorted(tags.items())}
    start_of_data = end + sum(len(content) for content in packed.values() if len(content) > 4)
    for tag, content in packed.items():
        kind, values = tags[tag]
        entries += struct.pack(order + "HHI", tag, kind, len(values) // (2 if kind in (5, 10) else 1))
        if tag == 273:
            entries += struct.pack(order + "I", start_of_data)
        elif len(content) > 4:
            entries += struct.pack(order + "I", end + len(beyond))
            beyond += content
        else:
            entries += content.ljust(4, b"\0")
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    return header + entries + bytes(4) + beyond + data


def tiff(
    values: NDArray[Any],
    order: str = "<",
    *,
    bits: int | None = None,
    photometric: int | None = None,
    data: bytes | None = None,
    tags: Mapping[int, Tag] | None = None,
) -> bytes:
    """An uncompressed TIFF of H x W or H x W x C values, in either byte order, with these tags as well."""
    height, width, channels = (*values.shape, 1)[:3]
    if data is None:
        data = values.astype(values.dtype.newbyteorder(order)).tobytes()  # type: ignore[arg-type]
    own: dict[int, Tag] = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits or 8 * values.dtype.itemsize] * channels),
        259: (3, [1]),
        262: (3, [(1 if channels == 1 else 2) if photometric is None else photometric]),
        273: (4, [0]),
        277: (3, [channels]),
        278: (4, [height]),
        279: (4, [len(data)]),
        339: (3, [{"u": 1, "i": 2, "f": 3}[values.dtype.kind]] * channels),
    }
    return directory(own | dict(tags or {}), order, data)


def png(values: NDArray[np.uint16], *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 16 bits, grey or with 2 to 4 channels, with these chunks before the pixels."""
    height, width, channels = (*values.shape, 1)[:3]
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    all_chunks = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in all_chunks)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_exif(jpeg: bytes, exif: bytes, header: bytes = b"Exif\0\0") -> bytes:
    """A JPEG with this EXIF data in front."""
    segment = header + exif
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]
