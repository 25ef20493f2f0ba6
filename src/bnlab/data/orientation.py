"""Which way up a photo is: the orientation that its camera wrote, read whatever else is broken in the metadata."""

import re
import struct
from contextlib import suppress

from PIL import Image

TAG = 274  # Orientation, in EXIF and TIFF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Format of one value, by the type of a tag. A byte string is read as bytes.
_TYPES = {1: "B", 3: "H", 4: "I", 6: "b", 7: "B", 8: "h", 9: "i", 11: "f"}
_XMP = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """How a loaded image has to be turned to be upright; None if it is.

    Pillow has turned a TIFF already when it is loaded, and has deleted its tag. (`ImageOps.exif_transpose` is not used:
    it writes all tags again after it has turned the pixels, and fails at any that is broken.)
    """
    value = None
    with suppress(Exception):  # Pillow raises anything at broken tags
        value = _number(image.getexif().get(TAG))
    if value is None:
        unmarked = [data for name, data in getattr(image, "applist", ()) if name == "APP1"]  # without its "Exif" header
        found = map(_of_exif, [image.info.get("exif"), *unmarked])
        value = next((value for value in found if value is not None), None)
    if value is None:
        value = _of_xmp(image.info)
    return _TURNS.get(value or 1)


def _number(value: object) -> int | None:
    """The orientation as a number, of whatever type the tag is: an array counts by its first value."""
    if isinstance(value, tuple | list):
        value = value[0] if value else None
    if isinstance(value, bytes):  # one byte, or two that were meant to be a SHORT
        return int.from_bytes(value.strip(b"\0"), "big") if value.strip(b"\0") else None
    try:
        return None if value is None else int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError, ArithmeticError):  # text, NaN, infinity, a fraction with the denominator 0
        return None


def _of_exif(exif: object) -> int | None:
    """The orientation in the first directory of EXIF data, from which tags after it may be missing."""
    if not isinstance(exif, bytes):
        return None
    data = re.sub(rb"^(?:Exif\0\0)+", b"", exif)
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return None
    with suppress(struct.error, OverflowError, ValueError):  # the end is missing, or a float is not finite
        (start,) = struct.unpack_from(order + "I", data, 4)
        (entries,) = struct.unpack_from(order + "H", data, start)
        for entry in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind = struct.unpack_from(order + "HH", data, entry)
            if tag == TAG and kind in _TYPES:
                return int(struct.unpack_from(order + _TYPES[kind], data, entry + 8)[0])
    return None


def _of_xmp(info: dict[str | tuple[int, int], object]) -> int | None:
    for key in ("XML:com.adobe.xmp", "xmp"):
        text = info.get(key)
        text = text.encode("utf-8", "replace") if isinstance(text, str) else text
        if isinstance(text, bytes) and (found := _XMP.search(text)):
            return int(found[1])
    return None
