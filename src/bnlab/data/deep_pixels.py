"""Pictures of more than 8 bits a channel: the values that the file holds, and the range that they are shown by.

Pillow reduces some of them to 8 bits by taking the high byte, so that 12 bits in 16 leave 17 levels. Here they are read
with all their bits, and one range makes 8 bits of them: the one that is set, else the one that the file declares, else
0 to 65535.
"""

import math
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile

from bnlab.errors import PhotoError
from bnlab.recipe import Range

ASSUMED: Range = (0, 65535)
"""the range of a picture that declares none"""
_UNKNOWN = "and no pixel_range says which values are black and white"
_REMEDY = "set pixel_range, or save it with 8 or 16 bits"
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_SAMPLE_RANGES = ((340, 341), (280, 281))  # SMinSampleValue and SMaxSampleValue, MinSampleValue and MaxSampleValue
# Decoders of 16-bit colours that take the high byte of each value, and their twins that take the low byte.
_OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


class PixelRangeError(PhotoError):
    """The values of a picture have no range that bnlab can know."""


@dataclass(frozen=True, kw_only=True)
class DeepPixels:
    """The values of a picture as the file holds them."""

    values: NDArray[Any]
    """grey H x W, or colours H x W x 3"""
    declared: Range | None
    """the range that the file declares, if that is not all that its type holds"""
    inverted: bool = False
    """whether the low end is white"""
    opacity: NDArray[np.uint8] | None = None
    """H x W, 255 where the picture is opaque; None if it is everywhere"""

    @property
    def largest(self) -> float:
        return float(self.values.max())

    def to_8_bits(self, name: str, chosen: Range | None, *, own_maximum: bool = False) -> Image.Image:
        """The picture in RGB, or in RGBA where it has an opacity. What lies outside of the range is cut off.

        Without a chosen or declared range it is ASSUMED, or with `own_maximum` from 0 to the picture's largest value.

        Raises:
            PixelRangeError: the values do not fit into the range that is assumed.
            PhotoError: values are not finite.
        """
        values = self.values
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise PhotoError(name, "some of its pixels are NaN or infinite")
        scale = chosen or self.declared
        if scale is None:
            if values.dtype.kind == "f":
                what = f"its pixels are floating-point numbers, {_UNKNOWN}"
                raise PixelRangeError(name, what, _REMEDY)
            if values.min() < ASSUMED[0] or values.max() > ASSUMED[1]:
                what = f"its pixels go from {values.min()} to {values.max()}, {_UNKNOWN}"
                raise PixelRangeError(name, what, _REMEDY)
            scale = (0, max(1.0, self.largest)) if own_maximum else ASSUMED
        if values.dtype.kind == "u" and values.dtype.itemsize == 2:
            pixels = _scaled(np.arange(65536), scale)[values]
        else:
            pixels = _scaled(values, scale)
        picture = Image.fromarray(255 - pixels if self.inverted else pixels).convert("RGB")
        if self.opacity is not None:
            picture.putalpha(Image.fromarray(self.opacity))
        return picture


def is_deep(image: ImageFile) -> bool:
    """Whether an image that is open, and not loaded, has more bits a channel than 8."""
    return (
        image.mode.startswith("I") or image.mode == "F" or _high_bytes(image) is not None or _ppm_maximum(image) > 255
    )


def read_deep(image: ImageFile, reopen: Callable[[], ImageFile]) -> DeepPixels:
    """Load a deep image. `reopen` opens the same file again."""
    maximum = _ppm_maximum(image)
    if maximum > 255 and image.tile[0][0] != "ppm_plain":
        return _read_ppm(image, maximum)
    if rawmode := _high_bytes(image):
        return _read_colours(image, rawmode, reopen)
    bits = _declared_bits(image)
    image.load()
    if image.format == "PPM" and image.mode == "I":  # plain text, which Pillow scales to 16 bits
        values = np.round(np.asarray(image) * (maximum / 65535)).astype(np.uint16)
        return DeepPixels(values=values, declared=(0, maximum) if maximum < 65535 else None)
    if image.format == "JPEG2000" and bits:  # Pillow shifts them to 16 bits
        return DeepPixels(values=np.asarray(image) >> (16 - bits.bit_length()), declared=(0, bits))
    found = deep_pixels(image)
    return _with_png_facts(found, image, bits) if image.format == "PNG" else found


def deep_pixels(image: Image.Image) -> DeepPixels:
    """The values of a loaded grey image of more than 8 bits. A TIFF's tags are honoured."""
    tags: Any = getattr(image, "tag_v2", {})
    bits = _first(tags, _BITS, 16)
    values: NDArray[Any] = np.asarray(image)
    if bits == 32 and image.mode == "I" and _first(tags, _SAMPLE_FORMAT, 1) == 1:
        values = values.view(np.uint32)  # Pillow reads unsigned numbers as signed ones
    return DeepPixels(
        values=values,
        declared=_range_of_tags(tags) or ((0, 4095) if bits == 12 else None),
        inverted=_first(tags, _PHOTOMETRIC, 1) == 0,
    )


def _scaled(values: NDArray[Any], scale: Range) -> NDArray[np.uint8]:
    low, high = scale
    shares = (values.astype(np.float64) - low) / ((high - low) / 255)
    return (shares.clip(0, 255) + 0.5).astype(np.uint8)


def _first(tags: Any, tag: int, default: int) -> Any:
    """The first value of a tag of a TIFF."""
    with suppress(Exception):  # Pillow raises anything at broken tags
        value = tags[tag]
        return value[0] if isinstance(value, tuple) else value
    return default


def _range_of_tags(tags: Any) -> Range | None:
    for smallest, largest in _SAMPLE_RANGES:
        low, high = _first(tags, smallest, 0), _first(tags, largest, 0)
        with suppress(TypeError, ValueError, ArithmeticError):
            scale = (float(low), float(high))
            if scale[0] < scale[1] and all(map(math.isfinite, scale)):
                return scale
    return None


def _declared_bits(image: ImageFile) -> int:
    """The largest value of the bits that a PNG or JPEG 2000 declares; 0 if that is all 16 bits, or not known."""
    bits = 0
    if image.format == "PNG":
        bits = _significant_bits(image.fp)
    elif image.format == "JPEG2000":
        bits = _bits_of_jpeg2000(image.fp)
    return 2**bits - 1 if 8 <= bits < 16 else 0


def _significant_bits(file: Any) -> int:
    """The largest number in the sBIT chunk of a PNG, but that of the opacity; 0 if it has none."""
    position = file.tell()
    file.seek(8)
    bits = 0
    while len(header := file.read(8)) == 8 and header[4:] != b"IDAT":
        length = int.from_bytes(header[:4], "big")
        if header[4:] == b"sBIT":
            bits = max(file.read(length)[: 1 if length < 3 else 3], default=0)
            break
        file.seek(length + 4, 1)
    file.seek(position)
    return bits


def _bits_of_jpeg2000(file: Any) -> int:
    position = file.tell()
    file.seek(0)
    start = file.read(4096)
    file.seek(position)
    at = 42 if start.startswith(b"\xff\x4f\xff\x51") else start.find(b"ihdr") + 14
    return 1 + (start[at] & 0x7F) if 14 <= at < len(start) else 0  # 128 if the components differ


def _ppm_maximum(image: ImageFile) -> int:
    """The maxval of a PGM or PPM; 0 of other files, and of colours as plain text, which Pillow reads with 8 bits."""
    if image.format != "PPM" or image.mode not in ("I", "RGB"):
        return 0
    decoder, _, _, arguments = image.tile[0]
    if image.mode == "RGB" and decoder != "ppm":
        return 0
    return int(arguments[-1]) if isinstance(arguments, tuple) else 65535


def _read_ppm(image: ImageFile, maximum: int) -> DeepPixels:
    shape = image.size[::-1] + ((3,) if image.mode == "RGB" else ())
    file: Any = image.fp
    file.seek(image.tile[0][2])
    values = np.frombuffer(file.read(2 * math.prod(shape)), ">u2").reshape(shape)
    return DeepPixels(values=values, declared=(0, maximum) if maximum < 65535 else None)


def _high_bytes(image: ImageFile) -> str | None:
    """The name of the decoder of 16-bit colours, if they are such as can be read with all bits."""
    arguments = image.tile[0][3] if image.tile else None
    rawmode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    kinds = ("RGB;16", "RGBX;16", "RGBA;16", "LA;16")
    return rawmode if isinstance(rawmode, str) and rawmode[:-1] in kinds and rawmode[-1] in _OTHER_ORDER else None


def _read_colours(image: ImageFile, rawmode: str, reopen: Callable[[], ImageFile]) -> DeepPixels:
    """Read the high bytes from an image and the low bytes from another one of the same file."""
    bits = _declared_bits(image)
    of_grey = rawmode.startswith("LA")  # decoded as RGBA these are the high and low byte of grey and of opacity
    low_bytes = "RGBA" if of_grey else rawmode[:-1] + _OTHER_ORDER[rawmode[-1]]
    image.load()
    again = reopen()  # later, because both move the position in the file
    again.tile = [
        tile._replace(args=(low_bytes, *tile[3][1:]) if isinstance(tile[3], tuple) else low_bytes)
        for tile in again.tile
    ]
    again.load()
    high, low = np.asarray(image), np.asarray(again)  # H x W x 3 or 4
    if of_grey:
        values = low[..., 0].astype(np.uint16) << 8 | low[..., 1]  # H x W
        opacity: NDArray[np.uint8] | None = low[..., 2]
    else:
        values = high[..., :3].astype(np.uint16) << 8 | low[..., :3]  # H x W x 3
        opacity = high[..., 3] if high.shape[2] == 4 else None
    found = DeepPixels(values=values, declared=_range_of_tags(getattr(image, "tag_v2", {})), opacity=opacity)
    return _with_png_facts(found, image, bits) if image.format == "PNG" else found


def _with_png_facts(found: DeepPixels, image: ImageFile, bits: int) -> DeepPixels:
    """Add the transparent colour of a PNG, and decide what the significant bits that it declares mean.

    By the standard values are scaled up to 16 bits, so that the lowest bits of dark ones are 0. Files of cameras and
    microscopes that write them as they are, from 0 to what the bits hold, have others.
    """
    unscaled = bits and found.largest <= bits and (found.values & (65535 // (bits + 1))).any()
    found = replace(found, declared=(0, bits) if unscaled else ASSUMED if bits else None)
    transparent = image.info.get("transparency")
    if found.opacity is None and isinstance(transparent, int | tuple):
        same = found.values == np.array(transparent)
        opacity = np.where(same if same.ndim == 2 else same.all(2), 0, 255).astype(np.uint8)
        found = replace(found, opacity=opacity)
    return found
