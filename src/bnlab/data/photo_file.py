"""Opens a photo as upright 8-bit RGB, from a file or from memory, and gathers what its user should know of it."""

import io
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from bnlab.data import truncated_jpeg
from bnlab.data.deep_pixels import DeepPixels, deep_pixels, is_deep, read_deep
from bnlab.data.orientation import turn_of
from bnlab.errors import PhotoError, plural, printable
from bnlab.progress import Progress
from bnlab.recipe import MAX_MEGAPIXELS, Range

TRAIN_WITH_RANGE = "if 0 to {high} is meant, train with pixel_range={high}"
_PILLOWS_LIMIT = 178_956_970  # pixels that Pillow opens at most, unless a program changes that for all of its parts
_USUAL_MAXIMA = (255, 1023, 4095)  # of 8, 10 and 12 bits
_loading = threading.Lock()  # of images that are the user's: two threads must not load the same one
_gathering = threading.Lock()  # not of each object, so that what holds a reader can be pickled


@dataclass(slots=True)
class MemoryPhoto:
    """A photo that is not named by a path: the content of a file, a file that is open, or an image."""

    name: str
    """what messages call it"""
    content: bytes | IO[bytes] | Image.Image
    """a file is read from its position on, once, and stays open; an image is not changed"""

    def read(self) -> bytes:
        """The content of the file. It is kept: a photo may be opened again, and a stream cannot be read again."""
        assert not isinstance(self.content, Image.Image)
        if not isinstance(self.content, bytes):
            self.content = self.content.read()
        return self.content


class _Found:
    """What the user should know of the photos that were read. Threads share it."""

    def __init__(self) -> None:
        self.truncated: dict[str, float | None] = {}  # the part of a photo that is there; None once it is reported
        self.deep: set[str] = set()  # pictures of more than 8 bits a channel that declare no range
        self.largest = 0.0  # value in them
        self.is_dark = True  # whether all of them may be meant for a smaller range, and that is not reported yet

    def add_truncated(self, name: str, part: float) -> None:
        with _gathering:
            self.truncated.setdefault(name, part)

    def add_deep(self, name: str, largest: float) -> None:
        with _gathering:
            self.largest = max(self.largest, largest)
            if self.largest > _USUAL_MAXIMA[-1]:
                self.is_dark = False
            if self.is_dark:
                self.deep.add(name)
            else:
                self.deep.clear()


@dataclass(frozen=True)
class PhotoReader:
    """Opens photos with these settings. `dataclasses.replace` gives one with others that gathers in the same place."""

    pixel_range: Range | None = None
    """values that are black and white in pictures of more than 8 bits a channel; None takes the file's own range"""
    max_megapixels: float = MAX_MEGAPIXELS
    """largest photo that is opened, in millions of pixels; 0 opens any"""
    found: _Found = field(default_factory=_Found)

    def open(self, photo: str | Path | MemoryPhoto, at_least: int = 0, *, own_maximum: bool = False) -> Image.Image:
        """Open a photo as upright 8-bit RGB.

        EXIF orientation is honoured; more than 8 bits a channel are scaled to 8, by the pixel range; palette, grey and
        CMYK images are converted; transparent pixels become white; the first frame of an animation is used. A JPEG
        whose end is missing is opened if nine tenths of its pixels are there.

        Args:
            photo: file of the photo, or a photo in memory
            at_least: short side in pixels that the caller needs. A larger JPEG may then be decoded at a half, a quarter
                or an eighth of its size, which is faster. 0 decodes all pixels, up to 178 million.
            own_maximum: scale a picture without a range by its own largest value: to compare it, not to learn from it

        Raises:
            PhotoError: the file is missing, empty, broken, not an image, too large, or not readable.
        """
        name = photo.name if isinstance(photo, MemoryPhoto) else str(photo)
        with _named_errors(name):
            if not isinstance(photo, MemoryPhoto):
                status = Path(photo).stat()
                if not stat.S_ISREG(status.st_mode):
                    raise PhotoError(name, "it is not a regular file")
                if status.st_size == 0:
                    raise PhotoError(name, "the file is empty (0 bytes)")
                with open(photo, "rb") as file:  # noqa: PTH123 (a photo of a list is text)
                    return self._read(name, file, at_least, own_maximum=own_maximum)
            if isinstance(photo.content, Image.Image):
                with _loading:
                    unread = _load_or_read(photo.content)
                if unread is None:
                    return self._converted(name, photo.content, own_maximum=own_maximum)
                return self._read(name, io.BytesIO(unread), at_least, own_maximum=own_maximum)
            content = photo.read()
            if not content:
                raise PhotoError(name, "there is nothing to read (0 bytes)")
            return self._read(name, io.BytesIO(content), at_least, own_maximum=own_maximum)

    def check_range(self, path: str) -> None:
        """Open a photo if it has more than 8 bits a channel, so that `report` knows its values; decode no other.

        Raises:
            PixelRangeError: its values have no range that bnlab can know.
            PhotoError: the photo cannot be used for another reason.
        """
        with _named_errors(path), open(path, "rb") as file:  # noqa: PTH123 (as above)
            if not is_deep(_identify(file)):
                return
        self.open(path)

    def report(self, progress: Progress, remedy: str = TRAIN_WITH_RANGE) -> bool:
        """Warn, once, of what was found: of photos whose end is missing, the first five by name, and of dark pictures.

        `remedy` says how to set the pixel range; "{high}" in it stands for its upper end. The result says whether there
        was something to warn of.
        """
        found = self.found
        with _gathering:
            truncated = {name: part for name, part in found.truncated.items() if part is not None}
            found.truncated |= dict.fromkeys(truncated)
            deep, found.deep = len(found.deep), set()
            found.is_dark &= not deep
        for name, part in list(truncated.items())[:5]:
            progress.warn(f"the end of {printable(name)} is missing: used, for {part:.0%} of its pixels are there")
        if len(truncated) > 5:
            progress.warn(f"and {plural(len(truncated) - 5, 'more photo')} whose end is missing")
        if deep:
            high = next(high for high in _USUAL_MAXIMA if found.largest <= high)
            progress.warn(
                f"{plural(deep, 'picture')} of more than 8 bits a channel {'declare' if deep > 1 else 'declares'} no "
                f"range of values: 0 to 65535 is assumed, and the largest value is {found.largest:g}, so all of it is "
                f"almost black; {remedy.format(high=high)}"
            )
        return bool(truncated or deep)

    def _read(self, name: str, file: IO[bytes], at_least: int, *, own_maximum: bool) -> Image.Image:
        image = self._identified(name, file)
        if is_deep(image):
            return self._reduced(name, image, read_deep(image, lambda: _identify(file)), own_maximum=own_maximum)
        try:
            return _upright_rgb(_loaded(image, at_least))
        except OSError as error:
            file.seek(0)
            if image.format not in ("JPEG", "MPO"):
                raise
            return self._without_end(name, file.read(), at_least, error)

    def _without_end(self, name: str, content: bytes, at_least: int, error: OSError) -> Image.Image:
        """The picture of a JPEG whose end is missing, if most of it is there."""

        def decode(content: bytes) -> Image.Image:
            return _loaded(self._identified(name, io.BytesIO(content)), at_least)

        try:
            picture, part = truncated_jpeg.complete(content, decode)
        except Exception:  # it is broken in another way
            raise error from None
        if part < truncated_jpeg.LEAST_PART:
            raise PhotoError(name, f"the file is truncated: {part:.0%} of its pixels are there")
        self.found.add_truncated(name, part)
        return _upright_rgb(picture)

    def _identified(self, name: str, file: IO[bytes]) -> ImageFile:
        image = _identify(file)
        pixels = image.width * image.height
        if self.max_megapixels and pixels > self.max_megapixels * 1e6:  # a few kilobytes can claim gigabytes
            what = f"its {image.width} x {image.height} pixels are {pixels / 1e6:.0f} million"
            raise PhotoError(
                name,
                f"{what}, more than the {self.max_megapixels:g} million of max_megapixels",
                f"scale it down, or set max_megapixels to {pixels // 1_000_000 + 1}",
            )
        return image

    def _converted(self, name: str, image: Image.Image, *, own_maximum: bool) -> Image.Image:
        """A loaded image of the user's as upright RGB."""
        if image.mode.startswith("I") or image.mode == "F":
            return self._reduced(name, image, deep_pixels(image), own_maximum=own_maximum)
        return _upright_rgb(image)

    def _reduced(self, name: str, image: Image.Image, pixels: DeepPixels, *, own_maximum: bool) -> Image.Image:
        """The pixels of an image as upright RGB with 8 bits."""
        picture = pixels.to_8_bits(name, self.pixel_range, own_maximum=own_maximum)
        if pixels.declared is None and not self.pixel_range:
            self.found.add_deep(name, pixels.largest)
        turn = turn_of(image)
        return _to_rgb(picture if turn is None else picture.transpose(turn))


def open_photo(path: str | Path, at_least: int = 0) -> Image.Image:
    """`PhotoReader.open` with the default settings."""
    return PhotoReader().open(path, at_least)


def _identify(file: IO[bytes]) -> ImageFile:
    """`Image.open` without its limit of pixels, which is one for all parts of a program that use Pillow."""
    file.seek(0)
    prefix = file.read(16)
    for load_plugins in (Image.preinit, Image.init):
        load_plugins()
        for kind in list(Image.ID):
            factory, accept = Image.OPEN[kind]
            try:
                accepted = accept is None or accept(prefix)
                if accepted and not isinstance(accepted, str):  # text says why Pillow lacks the format
                    file.seek(0)
                    return factory(file, "")
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue
    raise UnidentifiedImageError


def _loaded(image: ImageFile, at_least: int) -> ImageFile:
    """Decode an image; a JPEG perhaps at a part of its size."""
    pixels = image.width * image.height
    if at_least:
        image.draft(None, (at_least, at_least))
    elif pixels > _PILLOWS_LIMIT:
        image.draft(None, (image.width // 2, image.height // 2))  # all would take gigabytes
    if pixels > _PILLOWS_LIMIT // 2 and image.format == "TIFF":  # its decoder would check the limit again
        pillow: Any = Image
        tiff: Any = image
        tiff.im = pillow.core.new(image.mode, tiff._tile_size)
    image.load()
    return image


def _load_or_read(image: Image.Image) -> bytes | None:
    """Load an image of the user's; or give its file, where Pillow would lose bits, or refuse a JPEG without its end."""
    file = getattr(image, "fp", None)
    if not isinstance(image, ImageFile) or not image.tile or file is None or image.tell():  # it is loaded, or a frame
        image.load()
        return None
    if not is_deep(image):
        try:
            image.load()
            return None
        except OSError:
            if image.format not in ("JPEG", "MPO"):
                raise
    position = file.tell()
    file.seek(0)
    content: bytes = file.read()
    file.seek(position)
    return content


def _upright_rgb(image: Image.Image) -> Image.Image:
    turn = turn_of(image)
    return _to_rgb(image if turn is None else image.transpose(turn))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, rgba).convert("RGB")
    return image.convert("RGB")


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Whatever goes wrong with a photo becomes a PhotoError."""
    try:
        yield
    except PhotoError:
        raise
    except FileNotFoundError:
        raise PhotoError(name, "there is no such file", "check the path") from None
    except PermissionError:
        raise PhotoError(name, "it may not be read (permission denied)", "change its permissions") from None
    except Image.DecompressionBombError:  # Pillow's own limit, which some of its decoders check
        what = "its pixels are more than the 178 million that Pillow reads in this format"
        raise PhotoError(name, what, "save it as JPEG or PNG") from None
    except UnidentifiedImageError:
        if Path(name).suffix.lower() in (".heic", ".heif"):
            raise PhotoError(name, "HEIC images are not supported", "save it as JPEG") from None
        raise PhotoError(name, "it is not an image that Pillow can read") from None
    except Exception as error:  # decoders raise anything at broken files: OSError, SyntaxError, zlib.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PhotoError(name, f"the image is broken ({reason})") from None
