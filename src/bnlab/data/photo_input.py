"""What `Classifier.predict` takes for a photo: a path, bytes, an open file, an image, an array or a tensor."""

import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from os import PathLike, fspath
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bnlab.data.photo_file import MemoryPhoto
from bnlab.errors import UsageError, printable

PhotoInput = str | PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | NDArray[Any] | torch.Tensor
"""One photo. Arrays and tensors are uint8 of height x width x 3 (RGB), x 4 (with opacity), x 1 or none (grey)."""

_IN_MEMORY = 128  # photos of an iterator that are in memory at a time
_CHANNELS = (1, 3, 4)
_KINDS = "a path, bytes, a binary file, a PIL image, or a uint8 array or tensor of height x width x 3"


def photos_of(given: PhotoInput | Iterable[PhotoInput]) -> Iterator[list[str | MemoryPhoto]]:
    """The photos of an argument, in lists that together hold them in order.

    The argument is a photo, or an iterable of photos. A sequence gives one list; an iterator is not read to its end
    before the first list is used, unless it gives paths.

    Raises:
        UsageError: something in it is not a photo; photos are counted from 1.
    """
    given = several(given)
    photos = (_as_photo(photo, number) for number, photo in enumerate(given, start=1))
    if isinstance(given, Sequence | np.ndarray | torch.Tensor):
        yield list(photos)
        return
    for first in photos:
        batch, room = [], _IN_MEMORY
        for photo in chain([first], photos):
            batch.append(photo)
            room -= isinstance(photo, MemoryPhoto)
            if not room:
                break
        yield batch


def check_batch(batch: object) -> NDArray[np.uint8]:
    """The batch of `predict_proba` as an array, N x H x W x 3.

    Raises:
        UsageError: it has another shape or type.
    """
    remedy = "pass a uint8 array or tensor of N x H x W x 3, red, green and blue from 0 to 255"
    if not isinstance(batch, (np.ndarray, torch.Tensor)):
        raise UsageError(f"predict_proba takes an array or a tensor, not a {type(batch).__name__}", remedy)
    shape = tuple(batch.shape)
    if len(shape) != 4 or shape[3] != 3 or (shape[0] and 0 in shape):
        if len(shape) == 3 and shape[2] == 3:
            remedy = "pass a batch of one: photo[None]"
        elif len(shape) == 4 and shape[1] == 3:
            remedy = "make the channels the last dimension: permute(0, 2, 3, 1), or transpose for an array"
        raise UsageError(f"predict_proba got the shape {' x '.join(map(str, shape)) or '()'}", remedy)
    if batch.dtype != (torch.uint8 if isinstance(batch, torch.Tensor) else np.uint8):
        raise UsageError(f"predict_proba got {batch.dtype} values", remedy)
    return batch.detach().cpu().numpy() if isinstance(batch, torch.Tensor) else batch


def several(given: PhotoInput | Iterable[PhotoInput]) -> Iterable[PhotoInput]:
    """The argument as an iterable of photos; one photo alone gives a list.

    Raises:
        UsageError: it is neither.
    """
    if isinstance(given, np.ndarray | torch.Tensor):
        return given if given.ndim == 4 else [given]  # several photos have four dimensions
    if isinstance(given, str | PathLike | bytes | bytearray | memoryview | Image.Image) or hasattr(given, "read"):
        return [cast(PhotoInput, given)]
    if not isinstance(given, Iterable):
        raise UsageError(f"predict takes photos, not {_kind(given)}", f"pass {_KINDS}, or a list of these")
    return given


def _as_photo(photo: object, number: int) -> str | MemoryPhoto:
    name = f"photo {number}"
    if isinstance(photo, MemoryPhoto):
        return photo
    if isinstance(photo, str | PathLike):
        path = fspath(photo)
        if not isinstance(path, str):
            raise UsageError(f"{name} is a path of bytes", "pass text: os.fsdecode(path)")
        return path
    if isinstance(photo, bytes | bytearray | memoryview):
        return MemoryPhoto(name, bytes(photo))
    if isinstance(photo, Image.Image):
        return MemoryPhoto(name, photo)
    if isinstance(photo, np.ndarray | torch.Tensor):
        return MemoryPhoto(name, Image.fromarray(_as_array(photo, name)))
    if isinstance(photo, io.TextIOBase):
        raise UsageError(f"{name} is a file that is open as text", 'open it with mode "rb"')
    if hasattr(photo, "read"):
        return MemoryPhoto(name, cast(BinaryIO, photo))
    raise UsageError(f"{name} is {_kind(photo)}", f"pass {_KINDS}")


def _as_array(photo: NDArray[Any] | torch.Tensor, name: str) -> NDArray[np.uint8]:
    """The pixels, H x W or H x W x C, in memory of numpy's; a tensor may be on a GPU."""
    shape = " x ".join(map(str, photo.shape)) or "no dimensions"
    kind = f"{name} is {_kind(photo)} of {str(photo.dtype).removeprefix('torch.')} with the shape {shape}"
    if photo.dtype not in (np.uint8, torch.uint8):
        raise UsageError(kind, "pass uint8 from 0 to 255; for values from 0 to 1, (255 * x).round() as uint8")
    is_tensor = isinstance(photo, torch.Tensor)
    has_channels = photo.ndim == 3 and photo.shape[2] in _CHANNELS
    if photo.ndim == 3 and photo.shape[0] in _CHANNELS and (is_tensor or not has_channels):
        # torchvision's layout, or a tensor such as 3 x 40 x 3, of which nobody can say what it is
        raise UsageError(
            f"{kind}: its channels are first, or may be",
            f"pass height x width x 3, x.{'permute' if is_tensor else 'transpose'}(1, 2, 0), or a PIL image",
        )
    if not (photo.ndim == 2 or has_channels) or 0 in photo.shape:
        raise UsageError(kind, "pass height x width x 3 for one photo, or a list of such")
    array: NDArray[np.uint8] = photo.detach().cpu().numpy() if isinstance(photo, torch.Tensor) else photo
    return np.ascontiguousarray(array[..., 0] if photo.shape[2:] == (1,) else array)


def _kind(value: object) -> str:
    return "None" if value is None else f"an object of type {printable(type(value).__name__)}"
