import io
import pickle
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bnlab.data import photo_file
from bnlab.data.deep_pixels import PixelRangeError
from bnlab.data.photo_file import MemoryPhoto, PhotoReader, open_photo
from bnlab.errors import PhotoError
from bnlab.progress import NullProgress
from tests.data.pictures import chunk, png, tiff

RED, GREEN = (250, 20, 10), (10, 200, 30)


def halves(width: int = 60, height: int = 40) -> Image.Image:
    """The left half is red, the right one green."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(GREEN, (width // 2, 0, width, height))
    return image


def encoded(image: Image.Image, kind: str) -> bytearray:
    content = io.BytesIO()
    image.save(content, kind)
    return bytearray(content.getvalue())


def broken_png() -> bytes:
    content = encoded(halves(), "PNG")
    content[60] ^= 0xFF
    return bytes(content)


def decompression_bomb() -> bytes:
    """A PNG of a few bytes whose header claims 50,000 x 50,000 pixels."""

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def reason(path: Path) -> str:
    with pytest.raises(PhotoError) as error:
        open_photo(path)
    assert str(error.value).startswith(f"{path} cannot be used, ")
    return error.value.reason


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jpg", b"not an image, and long enough to be one", "not an image"),
        ("a.jpg", bytes(encoded(halves(200, 200), "JPEG")[:-200]), "truncated"),
        ("a.png", bytes(encoded(halves(), "PNG")[:-30]), "truncated"),
        ("a.webp", bytes(encoded(halves(), "WEBP")[:-30]), "broken"),
        ("a.jpg", b"", "empty"),
        ("a.png", broken_png(), "broken"),
        (
            "a.png",
            decompression_bomb(),
            "its 50000 x 50000 pixels are 2500 million, more than the 250 million of",
        ),
        ("a.HEIC", b"\0\0\0\x18ftypheic" + bytes(50), "HEIC"),
    ],
)
def test_a_file_that_is_not_usable_is_refused_with_the_reason(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert expected in reason(tmp_path / name)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "no such file" in reason(tmp_path / "a.jpg")
    assert "not a regular file" in reason(tmp_path)


def test_the_first_frame_of_an_animation_is_used(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), RED), Image.new("RGB", (20, 20), GREEN)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_photo(tmp_path / "a.gif").getpixel((5, 5)) == RED


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.asarray(open_photo(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 100, 255]


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = open_photo(tmp_path / "a.jpg").getpixel((4, 4))
    assert red > 200
    assert max(green, blue) < 50


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette_become_rgb(tmp_path: Path, mode: str) -> None:
    Image.new("RGB", (8, 8), "white").convert(mode).save(tmp_path / "a.png")
    image = open_photo(tmp_path / "a.png")
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", (255, 255, 255))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(tmp_path: Path, mode: str) -> None:
    options: dict[str, Any] = {"transparency": 0} if mode == "P" else {}
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert(mode).save(tmp_path / "a.png", **options)
    assert open_photo(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_transparent_colour_becomes_white(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), RED).save(tmp_path / "a.png", transparency=RED)
    assert open_photo(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_large_jpeg_is_decoded_at_a_part_of_its_size(tmp_path: Path) -> None:
    halves(640, 320).save(tmp_path / "a.jpg")
    assert open_photo(tmp_path / "a.jpg").size == (640, 320)
    assert open_photo(tmp_path / "a.jpg", at_least=80).size == (160, 80)


def test_what_is_more_than_the_limit_is_refused_with_its_size_and_the_setting(tmp_path: Path) -> None:
    halves(60, 40).save(tmp_path / "a.png")
    with pytest.raises(PhotoError, match=r"60 x 40 pixels .* max_megapixels"):
        PhotoReader(max_megapixels=0.002).open(tmp_path / "a.png")
    for limit in (0.0024, 0):
        assert PhotoReader(max_megapixels=limit).open(tmp_path / "a.png").size == (60, 40)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "BMP"])
def test_pillows_limit_is_not_asked_and_not_changed(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Above twice its limit Pillow refuses a picture, and above it warns, which is an error in tests."""
    content = bytes(encoded(halves(), kind))
    for limit in (1000, 2000):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        monkeypatch.setattr(photo_file, "_PILLOWS_LIMIT", 2 * limit)
        assert PhotoReader().open(MemoryPhoto("a photo", content)).getpixel((5, 5)) is not None
        assert limit == Image.MAX_IMAGE_PIXELS


def test_a_jpeg_that_pillow_would_refuse_is_decoded_at_half_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photo_file, "_PILLOWS_LIMIT", 2000)
    assert PhotoReader().open(MemoryPhoto("a photo", bytes(encoded(halves(), "JPEG")))).size == (30, 20)


def test_mpo_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), RED), Image.new("RGB", (20, 20), GREEN)]
    frames[0].save(tmp_path / "a.mpo", save_all=True, append_images=frames[1:], quality=100)
    assert np.abs(np.asarray(open_photo(tmp_path / "a.mpo")).astype(int) - RED).max() < 8


def test_photos_in_memory_are_named_in_errors() -> None:
    with pytest.raises(PhotoError, match=r"^photo 3 cannot be used, there is nothing to read"):
        PhotoReader().open(MemoryPhoto("photo 3", b""))
    with pytest.raises(PhotoError, match=r"^photo 3 cannot be used, it is not an image"):
        PhotoReader().open(MemoryPhoto("photo 3", io.BytesIO(b"text and more text")))
    closed = Image.open(io.BytesIO(bytes(encoded(halves(), "PNG"))))
    closed.close()
    with pytest.raises(PhotoError, match=r"^photo 3 cannot be used, the image is broken"):
        PhotoReader().open(MemoryPhoto("photo 3", closed))


def test_threads_may_read_the_same_image(tmp_path: Path) -> None:
    halves(640, 320).save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: PhotoReader().open(MemoryPhoto("a photo", image)).tobytes(), range(8)))
    assert len(set(found)) == 1


def deep(top: int) -> MemoryPhoto:
    return MemoryPhoto(f"picture up to {top}", png(np.array([[0, top]], dtype=np.uint16)))


@pytest.mark.parametrize(
    ("values", "high"), [((200, 100), 255), ((200, 256), 1023), ((1023,), 1023), ((1024, 4095), 4095), ((0,), 255)]
)
def test_pictures_that_are_all_dark_are_reported_once(values: tuple[int, ...], high: int) -> None:
    reader, progress = PhotoReader(), NullProgress()
    for value in values * 2:
        reader.open(deep(value))
    reader.report(progress)
    reader.open(deep(7))
    reader.report(progress)
    (warning,) = progress.warnings
    assert warning.startswith(f"{len(values)} picture")
    assert f"the largest value is {max(values)}," in warning
    assert "0 to 65535 is assumed" in warning
    assert warning.endswith(f"train with pixel_range={high}")


def test_pictures_that_use_16_bits_or_have_a_range_are_not_reported() -> None:
    reader, progress = PhotoReader(), NullProgress()
    for value in (200, 4096, 300):
        reader.open(deep(value))
    reader.report(progress)
    given = PhotoReader((0, 255))
    given.open(deep(200))
    given.report(progress)
    general = PhotoReader()  # of classifiers, each of which opens photos in its own range
    replace(general, pixel_range=(0, 255)).open(deep(200))
    assert not general.report(progress)
    assert progress.warnings == []


def test_a_file_in_memory_is_read_once_and_may_be_opened_again() -> None:
    content = io.BytesIO()
    halves().save(content, "PNG")
    stream = io.BytesIO(b"before" + content.getvalue())
    stream.seek(6)
    photo = MemoryPhoto("a photo", stream)
    assert PhotoReader().open(photo).tobytes() == PhotoReader().open(photo).tobytes() == halves().tobytes()


def test_an_image_that_pillow_has_not_loaded_is_read_as_its_file_is(tmp_path: Path) -> None:
    """Pillow would take the high byte of 12 bits, and refuse a JPEG whose last bytes are missing."""
    grey = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    values = {"grey.png": grey, "colours.png": np.stack([grey] * 3, axis=2)}
    for name, of_12_bits in values.items():
        (tmp_path / name).write_bytes(png(of_12_bits, (b"sBIT", bytes([12] * (1 if of_12_bits.ndim == 2 else 3)))))
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(content, "JPEG")
    (tmp_path / "truncated.jpg").write_bytes(content.getvalue()[:-40])
    for name in (*values, "truncated.jpg"):
        reader = PhotoReader()
        with Image.open(tmp_path / name) as image:
            for _ in range(2):
                assert reader.open(MemoryPhoto(name, image)).tobytes() == open_photo(tmp_path / name).tobytes()
        assert list(reader.found.truncated) == [name] * (name == "truncated.jpg")


def test_check_range_decodes_only_pictures_that_may_have_none(tmp_path: Path) -> None:
    (tmp_path / "deep.png").write_bytes(png(np.array([[0, 9]], dtype=np.uint16)))
    (tmp_path / "float.tif").write_bytes(tiff(np.ones((2, 2), dtype=np.float32)))
    (tmp_path / "broken.png").write_bytes(broken_png())
    reader = PhotoReader()
    reader.check_range(str(tmp_path / "deep.png"))
    assert reader.found.largest == 9
    reader.check_range(str(tmp_path / "broken.png"))  # 8 bits: it is not decoded
    with pytest.raises(PixelRangeError):
        reader.check_range(str(tmp_path / "float.tif"))


def test_what_holds_a_reader_can_be_pickled() -> None:
    reader = PhotoReader(max_megapixels=9)
    reader.open(deep(7))
    again = pickle.loads(pickle.dumps(reader))
    assert (again.max_megapixels, again.found.largest) == (9, 7)
