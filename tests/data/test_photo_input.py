import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bnlab.data import photo_input
from bnlab.data.photo_file import MemoryPhoto, PhotoReader
from bnlab.data.photo_input import photos_of
from bnlab.errors import UsageError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
GREY = PIXELS[..., 0]


def png() -> bytes:
    content = io.BytesIO()
    Image.fromarray(PIXELS).save(content, "PNG")
    return content.getvalue()


def only(given: Any) -> str | MemoryPhoto:
    ((photo,),) = photos_of(given)
    return photo


def pixels(photo: str | MemoryPhoto) -> Any:
    return np.asarray(PhotoReader().open(photo))


SAME = [
    png(),
    bytearray(png()),
    memoryview(png()),
    Image.fromarray(PIXELS),
    Image.open(io.BytesIO(png())),
    PIXELS,
    PIXELS[::-1][::-1],  # not in one piece of memory
    torch.from_numpy(PIXELS),
    torch.from_numpy(PIXELS.transpose(2, 0, 1).copy()).permute(1, 2, 0),
    np.dstack([PIXELS, np.full_like(GREY, 255)]),
]


@pytest.mark.parametrize("photo", SAME, ids=lambda photo: type(photo).__name__)
def test_every_kind_of_photo_gives_its_pixels(photo: Any) -> None:
    assert (pixels(only(photo)) == PIXELS).all()
    assert (pixels(only([photo])) == PIXELS).all()


def test_paths_stay_paths(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    path = str(tmp_path / "a.png")
    assert [only(path), only(tmp_path / "a.png"), only((path,)), only(iter([path]))] == [path] * 4


def test_a_file_is_read_from_its_position_on_and_stays_open(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"before" + png())
    with (tmp_path / "a.bin").open("rb") as file:
        file.seek(6)
        assert (pixels(only(file)) == PIXELS).all()
        assert not file.closed


@pytest.mark.parametrize("grey", [GREY, GREY[..., None], torch.from_numpy(GREY.copy())])
def test_grey_arrays(grey: Any) -> None:
    assert (pixels(only(grey)) == GREY[..., None]).all()


def test_transparent_pixels_of_an_array_become_white() -> None:
    assert (pixels(only(np.dstack([PIXELS, 0 * GREY]))) == 255).all()


def test_arrays_with_four_dimensions_are_several_photos() -> None:
    for several in (np.stack([PIXELS, PIXELS[::-1]]), torch.from_numpy(np.stack([PIXELS, PIXELS[::-1]]))):
        ((first, second),) = photos_of(several)
        assert (pixels(first) == PIXELS).all()
        assert (pixels(second) == PIXELS[::-1]).all()


def test_photos_without_a_path_are_counted_from_1() -> None:
    ((path, content, array),) = photos_of(["a.png", png(), PIXELS])
    assert (path, content.name, array.name) == ("a.png", "photo 2", "photo 3")  # type: ignore[union-attr]


def test_an_iterator_is_not_read_to_its_end_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photo_input, "_IN_MEMORY", 3)
    given = 0

    def photos() -> Iterator[Any]:
        nonlocal given
        for _ in range(4):
            given += 1
            yield PIXELS
            yield "a.png"

    lists = photos_of(photos())
    assert [len(next(lists)), given] == [5, 3]
    assert [len(some) for some in lists] == [3]
    assert [len(some) for some in photos_of(iter(["a.png"] * 10))] == [10]  # paths take no room
    assert [len(some) for some in photos_of([PIXELS] * 10)] == [10]  # in memory anyway


@pytest.mark.parametrize("nothing", [[], (), iter([])])
def test_no_photos_give_no_predictions(nothing: Any) -> None:
    assert [photo for some in photos_of(nothing) for photo in some] == []


CASES: list[tuple[Any, str]] = [
    (None, "takes photos, not None"),
    (5, "takes photos, not an object of type int"),
    ([png(), None], "photo 2 is None: pass a path"),
    ([png(), 5], "photo 2 is an object of type int"),
    ([[png()]], "photo 1 is an object of type list"),
    ({"a": 1, b"b": 2, 3: 4}, "photo 3 is an object of type int"),
    ([b"path".decode(), io.StringIO("text")], 'photo 2 is a file that is open as text: open it with mode "rb"'),
    ([PIXELS, PIXELS / 255], r"photo 2 is .* of float64 .*\(255 \* x\)\.round\(\)"),
    (torch.zeros(5, 5, 3), "photo 1 is .*Tensor of float32"),
    (PIXELS.astype(np.uint16), "of uint16"),
    (GREY > 100, "of bool"),
    (PIXELS.transpose(2, 0, 1), r"3 x 6 x 5: its channels are first.*x\.transpose\(1, 2, 0\)"),
    (torch.zeros(3, 6, 5, dtype=torch.uint8), r"channels are first.*x\.permute\(1, 2, 0\)"),
    (torch.zeros(2, 3, 6, 5, dtype=torch.uint8), "photo 1 .*channels are first"),
    (torch.zeros(3, 6, 3, dtype=torch.uint8), "channels are first, or may be"),
    (np.zeros((6, 5, 2), np.uint8), "6 x 5 x 2: pass height x width x 3"),
    (np.zeros((0, 5, 3), np.uint8), "0 x 5 x 3"),
    (np.zeros(5, np.uint8), "the shape 5"),
    (np.zeros((), np.uint8), "no dimensions"),
    ([np.zeros((2, 6, 5, 3), np.uint8)], "2 x 6 x 5 x 3"),
]


@pytest.mark.parametrize(("given", "complaint"), CASES, ids=[complaint for _, complaint in CASES])
def test_what_is_not_a_photo_is_refused_by_its_position(given: Any, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        list(photos_of(given))


def test_a_path_of_bytes_is_refused() -> None:
    class Odd:
        def __fspath__(self) -> bytes:
            return b"a.png"

    with pytest.raises(UsageError, match="path of bytes"):
        list(photos_of(Odd()))  # type: ignore[arg-type]
