import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bnlab.data.orientation import TAG
from bnlab.data.photo_file import MemoryPhoto, PhotoReader
from tests.data.pictures import chunk, directory, png, tiff, with_exif

PIXELS = np.zeros((16, 32, 3), dtype=np.uint8)
PIXELS[:8, :16], PIXELS[:8, 16:], PIXELS[8:, 16:] = (250, 20, 10), (255, 255, 255), (10, 200, 30)
PICTURE = Image.fromarray(PIXELS)
# What the tag says of the stored picture: where its rows and columns have to go (EXIF 2.32, table 6).
UPRIGHT = {
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.swapaxes(0, 1),
    6: np.rot90(PIXELS, -1),
    7: PIXELS[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90(PIXELS),
}
BROKEN = {282: (10, [-1, 0])}  # XResolution as a signed fraction, over 0


def encoded(kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    PICTURE.save(content, kind, **options)
    return content.getvalue()


JPEG = encoded("JPEG", quality=95)


def check(content: bytes, orientation: int = 6) -> None:
    found = np.asarray(PhotoReader().open(MemoryPhoto("a photo", content))).astype(int)
    assert found.shape == UPRIGHT[orientation].shape
    assert np.abs(found - UPRIGHT[orientation]).mean() < 8


def exif(orientation: Any = 6, kind: int = 3, order: str = "<", **others: Any) -> bytes:
    values = orientation if isinstance(orientation, list) else [orientation]
    return directory({TAG: (kind, values)} | {int(tag[1:]): value for tag, value in others.items()}, order)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_broken_tag_does_not_leave_a_photo_sideways(orientation: int, order: str) -> None:
    check(with_exif(JPEG, directory({TAG: (3, [orientation]), **BROKEN}, order)), orientation)
    check(tiff(PIXELS, order, tags={TAG: (3, [orientation]), **BROKEN}), orientation)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])
def test_the_orientation_may_be_a_number_of_any_type(kind: int, order: str) -> None:
    values = [6, 1] if kind in (5, 10) else [6]
    check(with_exif(JPEG, directory({TAG: (kind, values), **BROKEN}, order)))
    check(tiff(PIXELS, order, tags={TAG: (kind, values)}))


@pytest.mark.filterwarnings("ignore:.*too many entries")
@pytest.mark.parametrize("order", ["<", ">"])
def test_the_orientation_may_be_an_array_or_text(order: str) -> None:
    check(with_exif(JPEG, exif([6, 0], 3, order)))
    check(with_exif(JPEG, exif([6, 0], 1, order)))
    check(with_exif(JPEG, exif([b"6", b"\0"], 2, order)))
    check(tiff(PIXELS, order, tags={TAG: (3, [6, 0])}))


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(value: int) -> None:
    check(with_exif(JPEG, exif(value)), 1)
    check(tiff(PIXELS, tags={TAG: (3, [value])}), 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_orientation_that_is_not_finite_turns_nothing(value: float) -> None:
    check(with_exif(JPEG, exif(value, 11)), 1)


@pytest.mark.parametrize(
    "broken",
    [
        (271, 2, 5000, struct.pack("<I", 9999)),  # text beyond the end
        (271, 99, 1, b"abcd"),  # a type that does not exist
        (0x8769, 4, 1, struct.pack("<I", 99999)),  # a directory beyond the end
        (0x8769, 11, 1, b"\0\0\xc0\x7f"),  # a directory at NaN
        (282, 3, 1, struct.pack("<I", 5)),  # a fraction that is an integer
        (296, 2, 3, b"ab\0\0"),  # text where a number belongs
    ],
)
@pytest.mark.filterwarnings("ignore:Tag data larger")
def test_other_tags_may_be_broken_before_and_after(broken: tuple[int, int, int, bytes]) -> None:
    turned = (TAG, 3, 1, struct.pack("<HH", 6, 0))
    for entries in ([broken, turned], [turned, broken]):
        written = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
        check(with_exif(JPEG, b"II*\0" + struct.pack("<IH", 8, 2) + written + bytes(4)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File Read")
def test_exif_may_end_after_the_orientation() -> None:
    whole = exif(x282=(10, [-1, 0]))
    for length in range(20, len(whole)):
        check(with_exif(JPEG, whole[:length]))
    check(with_exif(JPEG, whole[:8] + struct.pack("<H", 400) + whole[10:22]))  # 399 more tags are announced
    check(with_exif(JPEG, whole[:18]), 1)


@pytest.mark.parametrize("header", [b"", b"Exif\0\0", b"Exif\0\0" * 2, b"Exif\0\0" * 3])
def test_the_header_of_exif_may_be_missing_or_repeated(header: bytes) -> None:
    check(with_exif(JPEG, exif(), header))
    half = PhotoReader().open(MemoryPhoto("a photo", with_exif(JPEG, exif(), header)), at_least=8)
    assert half.size == (8, 16)


@pytest.mark.parametrize("header", [b"", b"Exif\0\0"])
@pytest.mark.parametrize("at", [33, -12])  # before the pixels, and after them
def test_exif_in_png(at: int, header: bytes) -> None:
    plain, data = encoded("PNG"), header + exif(x282=(10, [-1, 0]))
    text = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n%8d\n" % len(data) + data.hex().encode() + b"\n")
    for added in (chunk(b"eXIf", data), chunk(b"zTXt", text)):
        check(plain[:at] + added + plain[at:])


def test_exif_in_a_png_of_16_bits() -> None:
    check(png(PIXELS.astype(np.uint16) * 257, (b"eXIf", exif())))
    grey = png(PIXELS[..., 0].astype(np.uint16) * 257, (b"eXIf", exif()))
    found = np.asarray(PhotoReader().open(MemoryPhoto("a photo", grey)))
    assert (found[..., 0] == np.rot90(PIXELS[..., 0], -1)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_in_other_formats(orientation: int) -> None:
    check(encoded("WEBP", lossless=True, exif=exif(orientation, x282=(10, [-1, 0]))), orientation)
    check(encoded("AVIF", quality=100, exif=exif(orientation)), orientation)
    mpo = encoded("MPO", save_all=True, append_images=[PICTURE], exif=b"Exif\0\0" + exif(orientation), quality=95)
    check(mpo, orientation)
    check(encoded("TIFF", exif=exif(orientation), compression="tiff_lzw"), orientation)
    check(encoded("TIFF", exif=exif(orientation), save_all=True, append_images=[PICTURE]), orientation)


@pytest.mark.parametrize("text", [b'tiff:Orientation="6"', b"<tiff:Orientation>6</tiff:Orientation>"])
def test_xmp_counts_where_exif_has_no_orientation(text: bytes) -> None:
    jpeg = encoded("JPEG", quality=95, xmp=b"<x:xmpmeta>" + text + b"</x:xmpmeta>")
    check(jpeg)
    check(with_exif(jpeg, b"no EXIF at all"))
    check(with_exif(jpeg, exif(8)), 8)
    check(encoded("WEBP", lossless=True, xmp=text))


def test_a_pil_image_is_turned_and_not_changed() -> None:
    for content in (with_exif(JPEG, exif()), tiff(PIXELS, tags={TAG: (3, [6])})):
        image = Image.open(io.BytesIO(content))
        size = image.size
        for _ in range(2):
            found = PhotoReader().open(MemoryPhoto("a photo", image))
            assert np.abs(np.asarray(found).astype(int) - UPRIGHT[6]).mean() < 8
        assert image.size == size
