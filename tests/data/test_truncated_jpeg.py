import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from bnlab.data.photo_file import MemoryPhoto, PhotoReader
from bnlab.errors import PhotoError
from bnlab.progress import NullProgress
from tests.data.pictures import directory, with_exif


def noisy(width: int = 120, height: int = 80) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([2 * y, x, (x + y) / 2], axis=2) + np.random.default_rng(0).normal(0, 10, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(mode: str = "RGB", **options: Any) -> bytes:
    content = io.BytesIO()
    noisy().convert(mode).save(content, "JPEG", **options)
    return content.getvalue()


def pixels(content: bytes, at_least: int = 0) -> Any:
    return np.asarray(PhotoReader().open(MemoryPhoto("a.jpg", content), at_least)).astype(int)


KINDS: list[dict[str, Any]] = [
    {},
    {"progressive": True},
    {"subsampling": 0},
    {"restart_marker_rows": 1},
    {"mode": "L"},
    {"mode": "L", "progressive": True},
    {"mode": "CMYK"},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_jpeg_without_its_last_bytes_is_used(kind: dict[str, Any]) -> None:
    content = jpeg(**kind)
    whole = pixels(content)
    for missing in (1, 2):  # of the end marker
        assert (pixels(content[:-missing]) == whole).all()
    for missing in (3, 10, len(content) // 50):
        reader = PhotoReader()
        found = np.asarray(reader.open(MemoryPhoto("a.jpg", content[:-missing]))).astype(int)
        assert found.shape == whole.shape
        assert (np.abs(found - whole)[:63] <= 1).all()  # all but the last row of blocks, and what its colours touch
        assert reader.found.truncated["a.jpg"] >= 0.9


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("part", [1 / 6, 1 / 2, 2 / 3])
def test_a_jpeg_that_lacks_much_is_refused(kind: dict[str, Any], part: float) -> None:
    content = jpeg(**kind)
    with pytest.raises(PhotoError, match="truncated"):
        pixels(content[: -int(part * len(content))])


def test_the_part_that_is_there_is_measured() -> None:
    """Against the rows that are the same as in the complete picture; blocks are 8 rows high, and as many wide."""
    content = jpeg(subsampling=0)
    whole = pixels(content)
    for missing in range(20, len(content) // 10, 60):
        reader = PhotoReader()
        try:
            found = np.asarray(reader.open(MemoryPhoto("a.jpg", content[:-missing]))).astype(int)
        except PhotoError:
            assert missing > len(content) // 15
            continue
        rows = (np.abs(found - whole).max((1, 2)) <= 1).argmin() / len(whole)
        assert rows <= reader.found.truncated["a.jpg"] <= rows + 8 / len(whole)


def test_a_progressive_jpeg_that_ends_between_two_scans_is_refused() -> None:
    """All of what is there is complete, and the picture is coarse."""
    content = jpeg(progressive=True)
    scans = [i for i in range(len(content) - 1) if content[i : i + 2] == b"\xff\xda"]
    assert len(scans) == 10
    for scan in scans[1:]:
        end = content.rindex(b"\xff\xc4", 0, scan)  # its Huffman table
        with pytest.raises(PhotoError, match="0% of its pixels"):
            pixels(content[:end])


def test_draft_and_orientation_hold_for_a_jpeg_without_its_end() -> None:
    content = with_exif(jpeg()[:-5], directory({274: (3, [6])}))
    assert pixels(content).shape == (120, 80, 3)
    assert pixels(content, at_least=20).shape == (30, 20, 3)


def test_pillows_setting_for_all_files_is_not_used() -> None:
    pixels(jpeg()[:-5])
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_photos_without_their_end_are_named_once(tmp_path: Path) -> None:
    reader, progress = PhotoReader(), NullProgress()
    for number in range(7):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg()[: -2 - number])
    for _ in range(2):
        for number in range(7):
            reader.open(tmp_path / f"{number}.jpg")
        reader.report(progress)
    assert len(progress.warnings) == 6
    assert f"the end of {tmp_path / '0.jpg'} is missing" in progress.warnings[0]
    assert "2 more" in progress.warnings[5]
