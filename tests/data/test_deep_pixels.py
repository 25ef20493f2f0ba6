import io
import pickle
import struct
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from bnlab.data.deep_pixels import PixelRangeError
from bnlab.data.photo_file import MemoryPhoto, PhotoReader
from bnlab.errors import PhotoError
from bnlab.recipe import Range
from tests.data.pictures import Tag, png, tiff

RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=2)
TWELVE: Range = (0, 4095)
ORDERS = pytest.mark.parametrize("order", ["<", ">"])


def expected(values: NDArray[Any], low: float = 0, high: float = 4095) -> NDArray[Any]:
    """By the definition: low is 0, high is 255, and what is outside is cut off."""
    return np.floor(255 * (values.astype(np.float64).clip(low, high) - low) / (high - low) + 0.5)


def read(content: bytes, pixel_range: Range | None = None, **options: Any) -> NDArray[Any]:
    picture = PhotoReader(pixel_range).open(MemoryPhoto("a picture", content), **options)
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def check(content: bytes, values: NDArray[Any], pixel_range: Range | None = None, *, declared: bool = True) -> None:
    found = read(content, pixel_range)
    assert (found == (values if values.ndim == 3 else values[..., None])).all()
    reader = PhotoReader()
    try:
        reader.open(MemoryPhoto("a picture", content))
        assert (reader.found.largest > 0) != declared
    except PixelRangeError:
        assert not declared


@ORDERS
@pytest.mark.parametrize("values", [RAMP, COLOURS], ids=["grey", "colours"])
@pytest.mark.parametrize("top", [4095, 1023, 3001, 65535])
def test_the_largest_value_that_a_tiff_declares(order: str, values: NDArray[Any], top: int) -> None:
    channels = 1 if values.ndim == 2 else 3
    for tags in ({281: (3, [top] * channels)}, {340: (3, [0]), 341: (3, [top] * channels)}, {341: (4, [top])}):
        check(tiff(values, order, tags=tags), expected(values, 0, top))


def test_the_smallest_value_that_a_tiff_declares_and_tags_that_make_no_sense() -> None:
    check(tiff(RAMP, tags={280: (3, [1000]), 281: (3, [3001])}), expected(RAMP, 1000, 3001))
    check(tiff(RAMP, tags={281: (3, [1]), 341: (3, [3001])}), expected(RAMP, 0, 3001))  # 341 is the newer one
    nonsense: list[dict[int, Tag]] = [{281: (3, [0])}, {280: (3, [9]), 281: (3, [9])}, {341: (11, [float("nan")])}]
    nonsense.append({341: (2, [b"x", b"\0"])})
    for tags in nonsense:
        check(tiff(RAMP, tags=tags), expected(RAMP, 0, 65535), declared=False)


@ORDERS
def test_values_without_a_range_are_scaled_from_16_bits_or_by_the_range_that_is_set(order: str) -> None:
    for values in (RAMP, COLOURS):
        check(tiff(values, order), expected(values, 0, 65535), declared=False)
        check(tiff(values, order), expected(values), TWELVE, declared=False)
        check(tiff(values, order), expected(values, 100, 900), (100, 900), declared=False)
        check(tiff(values, order, tags={281: (3, [4095] * 3)}), expected(values, 0, 1000), (0, 1000))


def test_all_values_of_16_bits_are_rounded_to_the_nearest() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for content in (png(values), tiff(values), tiff(np.stack([values] * 3, 2)), png(np.stack([values] * 3, 2))):
        assert (read(content)[..., 0] == np.round(values / 257)).all()


@ORDERS
def test_signed_and_32_bit_values(order: str) -> None:
    for kind in (np.int16, np.int32):
        check(tiff(RAMP.astype(kind) - 1024, order), expected(RAMP), (-1024, 3071), declared=False)
    check(tiff(RAMP.astype(np.int32), order), expected(RAMP), TWELVE, declared=False)
    check(tiff(RAMP.astype(np.int32) // 16, order), expected(RAMP // 16, 0, 255), (0, 255), declared=False)
    check(tiff(RAMP.astype(np.int32) * 500_000, order, tags={341: (4, [2047500000])}), expected(RAMP))
    with pytest.raises(PixelRangeError, match=r"from -1024 to 3071.*set pixel_range"):
        read(tiff(RAMP.astype(np.int16) - 1024, order))
    with pytest.raises(PixelRangeError, match="from 0 to 2047500000"):
        read(tiff(RAMP.astype(np.int32) * 500_000, order))


def test_unsigned_values_of_32_bits_do_not_become_negative() -> None:
    check(tiff(RAMP.astype(np.uint32) * 1_048_832), expected(RAMP), (0, 4095 * 1_048_832), declared=False)


def test_values_of_12_bits() -> None:
    pairs = RAMP.reshape(-1, 2).astype(int)
    packed = bytes(b for x, y in pairs.tolist() for b in (x >> 4, (x & 15) << 4 | y >> 8, y & 255))
    check(tiff(RAMP, bits=12, data=packed), expected(RAMP))


def test_a_tiff_whose_low_values_are_white() -> None:
    check(tiff(RAMP, photometric=0, tags={281: (3, [4095])}), 255 - expected(RAMP))
    check(tiff(RAMP.astype(np.float32), photometric=0), 255 - expected(RAMP), TWELVE, declared=False)


@ORDERS
def test_floating_point_values_need_a_range(order: str) -> None:
    values = (RAMP / np.float32(4095)).astype(np.float32)
    check(tiff(values, order, tags={340: (11, [0.0]), 341: (11, [1.0])}), expected(RAMP))
    check(tiff(values, order), expected(RAMP), (0, 1), declared=False)
    assert (read(tiff(RAMP.astype(np.float32) - 8000, order), (-8000, -3905))[..., 0] == expected(RAMP)).all()
    with pytest.raises(PixelRangeError, match=r"floating-point.*set pixel_range"):
        read(tiff(values, order))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    values = np.ones((4, 4), dtype=np.float32)
    values[2, 1] = value
    with pytest.raises(PhotoError, match="NaN or infinite"):
        read(tiff(values), (0, 1))


def test_the_error_survives_pickling() -> None:
    with pytest.raises(PixelRangeError) as caught:
        read(tiff(np.ones((4, 4), dtype=np.float32)))
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (PixelRangeError, str(caught.value))


def test_a_tiff_that_is_compressed() -> None:
    content = io.BytesIO()
    Image.fromarray(RAMP).save(content, "TIFF", compression="tiff_lzw")
    check(content.getvalue(), expected(RAMP), TWELVE, declared=False)


@pytest.mark.parametrize("bits", [10, 12])
def test_significant_bits_of_a_png(bits: int) -> None:
    """By the standard they are scaled up to 16 bits; some programs leave them as they are."""
    top = 2**bits - 1
    for values in (RAMP >> 12 - bits, COLOURS >> 12 - bits):
        significant = (b"sBIT", bytes([bits] * (1 if values.ndim == 2 else 3)))
        check(png(values, significant), expected(values, 0, top))
        scaled = values << 16 - bits | values >> 2 * bits - 16
        check(png(scaled, significant), expected(values, 0, top))
        zeros = values << 16 - bits
        check(png(zeros, significant), np.round(zeros / 257))
        dark = values // 64 << 16 - bits  # its largest value would fit into the bits, too
        check(png(dark, significant), np.round(dark / 257))


def test_opacity_of_16_bits_is_not_scaled_by_the_range() -> None:
    opacity = np.full_like(RAMP, 65535)
    opacity[0] = 0
    for colours in (RAMP[..., None], COLOURS):
        values = np.concatenate([colours, opacity[..., None]], axis=2)
        shown = np.broadcast_to(expected(colours), (64, 64, 3)).copy()
        shown[0] = 255
        check(png(values), shown, TWELVE, declared=False)
    check(tiff(values, "<", tags={338: (3, [2])}), shown, TWELVE, declared=False)
    check(tiff(values, ">", tags={338: (3, [0])}), expected(COLOURS), TWELVE, declared=False)  # not an opacity


@pytest.mark.parametrize("channels", [1, 3])
def test_the_significant_bits_of_an_opacity_are_not_those_of_the_colours(channels: int) -> None:
    values = np.stack([RAMP] * channels + [np.full_like(RAMP, 65535)], axis=2)
    check(png(values, (b"sBIT", bytes([12] * channels + [16]))), expected(RAMP))


def test_a_transparent_colour_of_16_bits_becomes_white() -> None:
    shown = expected(RAMP)
    shown[0, 5] = 255
    check(png(RAMP, (b"tRNS", struct.pack(">H", 5))), shown, TWELVE, declared=False)
    check(png(np.stack([RAMP] * 3, 2), (b"tRNS", struct.pack(">HHH", 5, 5, 5))), shown, TWELVE, declared=False)
    check(png(np.stack([RAMP] * 3, 2), (b"tRNS", struct.pack(">HHH", 5, 5, 6))), expected(RAMP), TWELVE, declared=False)


@pytest.mark.parametrize("maximum", [4095, 1023, 1000, 65535])
def test_the_maximum_of_pgm_and_ppm(maximum: int) -> None:
    is_declared = maximum < 65535
    for kind, values in ((b"P5", RAMP), (b"P6", COLOURS)):
        header = kind + b" 64 64 %d\n" % maximum
        binary = header + values.astype(">u2").tobytes()
        check(binary, expected(values, 0, maximum), declared=is_declared)
        check(binary, expected(values, 0, 900), (0, 900), declared=is_declared)
    text = b"P2 64 64 %d\n" % maximum + " ".join(map(str, np.minimum(RAMP, maximum).ravel().tolist())).encode()
    check(text, expected(RAMP, 0, maximum), declared=is_declared)
    check(text, expected(RAMP, 0, 900), (0, 900), declared=is_declared)
    with pytest.raises(PhotoError, match="broken"):
        read(binary[:-100])


def test_a_ppm_of_8_bits_is_left_to_pillow() -> None:
    values = np.arange(192, dtype=np.uint8).reshape(8, 8, 3) % 101
    check(b"P6 8 8 100\n" + values.tobytes(), np.round(values / 100 * 255), TWELVE)


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_the_bits_of_jpeg_2000(bits: int) -> None:
    """Pillow writes 16 bits. They are renamed, and the level that the format subtracts is made up for."""
    values = RAMP >> 12 - bits if bits < 12 else RAMP
    content = io.BytesIO()
    Image.fromarray((values + (2**15 - 2 ** (bits - 1))).astype(np.uint16)).save(content, "JPEG2000")
    changed = bytearray(content.getvalue())
    changed[changed.index(b"ihdr") + 14] = changed[changed.index(b"\xff\x4f\xff\x51") + 42] = bits - 1
    for file in (bytes(changed), bytes(changed[changed.index(b"\xff\x4f\xff\x51") :])):
        check(file, expected(values, 0, 2**bits - 1), declared=bits < 16)
        check(file, expected(values, 0, 900), (0, 900), declared=bits < 16)


def test_a_range_leaves_pictures_of_8_bits_alone() -> None:
    values = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    for kind in ("PNG", "TIFF", "BMP"):
        content = io.BytesIO()
        Image.fromarray(values).save(content, kind)
        check(content.getvalue(), values, (0, 10))


def test_a_pil_image_has_the_range_of_its_tags_or_the_one_that_is_set() -> None:
    opened = Image.open(io.BytesIO(tiff(RAMP, tags={281: (3, [4095])})))
    for image, scale in (
        (opened, None),
        (Image.fromarray(RAMP), TWELVE),
        (Image.fromarray(RAMP / np.float32(1)), TWELVE),
    ):
        found = PhotoReader(scale).open(MemoryPhoto("a picture", image))
        assert (np.asarray(found)[..., 0] == expected(RAMP)).all()


def test_to_compare_pictures_each_is_scaled_by_its_largest_value() -> None:
    assert (read(png(RAMP), own_maximum=True)[..., 0] == expected(RAMP)).all()
    assert (read(png(RAMP // 8), own_maximum=True)[..., 0] == expected(RAMP // 8, 0, 511)).all()
    assert (read(png(RAMP), (0, 1000), own_maximum=True)[..., 0] == expected(RAMP, 0, 1000)).all()
    assert (read(png(0 * RAMP), own_maximum=True) == 0).all()
