"""JPEG files whose end is missing: how much of the picture is there, and the picture itself.

libjpeg fills what is missing with grey, as browsers show it, if the file is closed by an end marker. Pillow does so for
all files of the process, however much is missing, once `ImageFile.LOAD_TRUNCATED_IMAGES` is set; that is not used here.
"""

import re
from collections.abc import Callable

import numpy as np
from PIL import Image

LEAST_PART = 0.9  # of the picture that has to be there
_END = b"\xff\xd9"
_NOISE = bytes(range(1, 255))  # wrong data without a marker (0xff)
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL)  # neither 0xff in the data of a scan, nor a restart
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN = 0xDA


def complete(content: bytes, decode: Callable[[bytes], Image.Image]) -> tuple[Image.Image, float]:
    """The picture, decoded from a JPEG without its end, and the fraction of it that is there, in 0..1.

    How far the last scan reaches shows in where the picture changes if wrong data follows. The fraction is 0 if a
    whole scan is missing: of a progressive JPEG, which refines the picture scan by scan, or of a colour.
    """
    content = content.rstrip(b"\xff")  # half a marker
    picture = decode(content + _END)
    rows = _rows_of_last_blocks(content)
    if rows is None:
        return picture, 0.0
    changed = (np.asarray(picture) != np.asarray(decode(content + _NOISE + _END))).reshape(*picture.size[::-1], -1)
    changed = changed.any(2)  # H x W
    if not changed.any():
        return picture, 1.0
    top = int(changed.any(1).argmax())
    blocks = changed[top : top + max(1, round(rows * picture.height))]  # what is left of the change in them is there
    left = int(blocks.any(0).argmax())
    return picture, (top + len(blocks) * left / picture.width) / picture.height


def _rows_of_last_blocks(content: bytes) -> float | None:
    """The height of the blocks of the last scan, as a fraction of the picture's.

    None, unless the scans that begin in this file give every coefficient of every component to its last bit.
    """
    missing: dict[int, list[bool]] = {}  # 64 coefficients of each component
    height, tallest, position, number = 0, 1, 2, 0
    while found := _MARKER.search(content, position):
        marker, start = found[1][0], found.end() + 2
        segment = content[start : start - 2 + int.from_bytes(content[start - 2 : start], "big")]
        if marker in _START_OF_FRAME:
            height = int.from_bytes(segment[1:3], "big")
            missing = {segment[6 + 3 * i]: [True] * 64 for i in range(segment[5])}
            tallest = max(segment[7 + 3 * i] & 15 for i in range(segment[5]))
        elif marker == _START_OF_SCAN:
            number = segment[0]
            first, last, bits = segment[1 + 2 * number : 4 + 2 * number]
            for component in segment[1 : 1 + 2 * number : 2]:
                missing[component][first : last + 1] = [bits & 15 > 0] * (last + 1 - first)
        position = start + len(segment)
    if not height or any(map(any, missing.values())):
        return None
    return 8 * (tallest if number > 1 else 1) / height
