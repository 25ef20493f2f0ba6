import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bnlab.data.preprocess import Preprocessing, normalise, open_photo, preprocess
from bnlab.errors import PhotoError

RED, GREEN = (250, 20, 10), (10, 200, 30)


def preprocessing(size: int = 32, resize: str = "squash", crop_fraction: float = 1.0) -> Preprocessing:
    return Preprocessing(
        size=size, resize=resize, crop_fraction=crop_fraction, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5)
    )


def halves(width: int = 60, height: int = 40) -> Image.Image:
    """Left red, right green."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(GREEN, (width // 2, 0, width, height))
    return image


def reason(path: Path) -> str:
    with pytest.raises(PhotoError) as error:
        open_photo(path)
    assert str(error.value).startswith(f"{path} cannot be used, ")
    return error.value.reason


def test_a_text_file_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("not a picture, and long enough to be one")
    assert reason(tmp_path / "a.jpg") == "it is no picture Pillow can read"


def test_a_truncated_jpeg_is_broken(tmp_path: Path) -> None:
    content = io.BytesIO()
    halves(200, 200).save(content, "JPEG")
    (tmp_path / "a.jpg").write_bytes(content.getvalue()[:-200])
    assert reason(tmp_path / "a.jpg") == "the file breaks off early (truncated)"


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    assert reason(tmp_path / "a.jpg") == "the file is empty (0 bytes)"


def test_a_broken_png(tmp_path: Path) -> None:
    content = io.BytesIO()
    halves().save(content, "PNG")
    spoilt = bytearray(content.getvalue())
    spoilt[60] ^= 0xFF
    (tmp_path / "a.png").write_bytes(spoilt)
    assert "broken" in reason(tmp_path / "a.png")


def test_a_decompression_bomb_is_refused_unopened(tmp_path: Path) -> None:
    """50,000 x 50,000 pixels in a few bytes: its header alone is read."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )
    (tmp_path / "a.png").write_bytes(png)
    assert reason(tmp_path / "a.png") == "its pixels are more than the 178 million that are safe to open"


def test_no_file_and_no_regular_file(tmp_path: Path) -> None:
    assert reason(tmp_path / "a.jpg") == "there is no such file"
    assert reason(tmp_path) == "it is no regular file"


def test_heic_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    assert reason(tmp_path / "a.HEIC") == "HEIC pictures are not read"


def test_the_first_frame_of_an_animation_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), RED), Image.new("RGB", (20, 20), GREEN)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_photo(tmp_path / "a.gif").getpixel((5, 5)) == RED


def test_16_bit_grey_is_scaled_not_cut_off(tmp_path: Path) -> None:
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
def test_what_is_transparent_becomes_white(tmp_path: Path, mode: str) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert(mode).save(
        tmp_path / "a.png", **({"transparency": 0} if mode == "P" else {})
    )
    assert open_photo(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_transparent_colour_becomes_white(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), RED).save(tmp_path / "a.png", transparency=RED)
    assert open_photo(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "a.tif")
    assert reason(tmp_path / "a.tif") == "its floating-point pixels have no known range"


def test_exif_rotation_is_honoured(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: turn by 90 degrees clockwise
    halves(60, 40).save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = open_photo(tmp_path / "a.jpg")
    assert image.size == (40, 60)
    top, bottom = image.getpixel((20, 10)), image.getpixel((20, 50))
    assert top[0] > 200
    assert bottom[0] < 60


def test_squash_sees_all_and_crop_the_centre() -> None:
    image = Image.new("RGB", (90, 30), RED)
    image.paste(GREEN, (30, 0, 60, 30))
    squashed = preprocess(image, preprocessing(30, "squash"))
    assert squashed.shape == (30, 30, 3)
    assert tuple(squashed[15, 2]) == RED
    assert tuple(squashed[15, 15]) == GREEN
    assert (preprocess(image, preprocessing(32, "crop")) == np.array(GREEN)).mean() > 0.9
    inner = preprocess(image, preprocessing(32, "crop", 0.5))
    assert (inner == np.array(GREEN)).all()


def test_normalise() -> None:
    pixels = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8)
    result = normalise(pixels, preprocessing())
    expected = (pixels.double() / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.25, 0.5])
    assert result.shape == (2, 3, 5, 4)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result.double(), expected.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)
