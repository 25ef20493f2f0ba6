"""Reads weights that other programs wrote: pickles of tensors alone, and safetensors. Nothing in them is executed."""

import io
import json
import pickle
import pickletools
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from bnlab.errors import ClassifierError, OutOfMemoryError, printable
from bnlab.machine import is_out_of_memory

_PICKLES = (b"PK\x03\x04", b"\x80")  # torch.save's zip, and a bare pickle
_DEEPEST = 2  # levels of a checkpoint that are searched, as in {"model": {"state_dict": ...}}
# All that a pickle of tensors calls. Any other class or function in a file, such as a setting of a training framework,
# is read as an `_Unread`.
_TENSOR_MAKERS: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
}
PACKED_REMEDY = "save the weights before they are quantised or packed"
_REMEDY = "save the state_dict() of the network alone: torch.save(network.state_dict(), FILE)"


class _Unread:
    """Takes the place of an object that is not a tensor. It ignores whatever its pickle does to it."""

    def __new__(cls, *_: object, **__: object) -> "_Unread":
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __call__(self, *_: object, **__: object) -> "_Unread":
        return _Unread()

    def __setstate__(self, _: object) -> None: ...

    def __setitem__(self, _: object, __: object) -> None: ...

    def append(self, _: object) -> None: ...

    extend = add = append


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles tensors and Python's containers; calls nothing else that a file names."""

    def find_class(self, module: str, name: str) -> Any:
        return _TENSOR_MAKERS.get((module, name), _Unread)


def read_content(path: Path, what: str, folder_remedy: str) -> bytes:
    """The bytes of a file; `what` is what messages call it, and `folder_remedy` what to pass in place of a folder.

    Raises:
        ClassifierError: the file cannot be read.
    """
    name = printable(path)
    try:
        if not path.exists():
            raise ClassifierError(f"there is no {what} {name}", "check the path")
        if path.is_dir():
            raise ClassifierError(f"{name} is a folder", folder_remedy)
        if not path.is_file():  # reading a pipe could wait forever
            raise ClassifierError(f"{name} is not a regular file", "pass a regular file")
        return path.read_bytes()
    except OSError as error:
        raise ClassifierError(f"{name} cannot be read ({error.strerror})", "check its permissions") from None


def is_pickle(content: bytes) -> bool:
    """Whether torch.save wrote it. (The length of a safetensors header may begin with the same byte as a pickle.)"""
    return content.startswith(_PICKLES) and content[8:9] != b"{"


def parse_safetensors(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        SafetensorError, ValueError: it is not a safetensors file, or truncated.
    """
    try:
        tensors = safetensors.torch.load(content)
    except KeyError as error:
        raise ValueError(f"torch has no data type {error}") from None
    header_size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + header_size]).get("__metadata__") or {}
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, by the names they have there, and the metadata of a safetensors file.

    Raises:
        ClassifierError: the file cannot be read, or holds anything but weights.
    """
    name = printable(path)
    content = read_content(path, "file", "pass a file of weights")
    try:
        if is_pickle(content):
            return _tensors_of(_load_pickle(content, name), name), {}
        tensors, metadata = parse_safetensors(content)
    except ClassifierError:
        raise
    except Exception as error:  # safetensors, zipfile, torch and pickle raise many types for a broken file
        if is_out_of_memory(error):
            raise OutOfMemoryError(f"out of memory while {name} was read", "close what else takes memory") from None
        raise ClassifierError(
            f"{name} is not a complete file of weights",
            "use what torch.save(network.state_dict(), FILE) wrote, or safetensors",
        ) from None
    return _tensors_of(tensors, name), metadata


def check_plain(name: str, tensor: Tensor, file: str) -> None:
    """Refuse a tensor that is nested, sparse, quantised or without values.

    Raises:
        ClassifierError: it is; `name` and `file` are what the message calls the tensor and its file.
    """
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise not_floats(name, tensor, file)


def not_floats(name: str, tensor: Tensor, file: str) -> ClassifierError:
    """The error for a tensor that does not hold plain floating-point numbers."""
    layout = "" if tensor.layout == torch.strided else f"{tensor.layout} of ".removeprefix("torch.")
    kind = layout + str(tensor.dtype).removeprefix("torch.") + (" without values" if tensor.is_meta else "")
    return ClassifierError(f"{file} has {printable(name)} as {kind}, not as floating-point numbers", PACKED_REMEDY)


def shape_text(shape: Iterable[int]) -> str:
    """A shape for messages: "64 x 3 x 7 x 7"; "one number" for ()."""
    return " x ".join(map(str, shape)) or "one number"


def _load_pickle(content: bytes, name: str) -> object:
    """What torch.save wrote, if it is weights alone; code in it is never run."""
    zipped = content.startswith(b"PK")
    if zipped:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if any(entry.endswith("/constants.pkl") for entry in archive.namelist()):
                raise ClassifierError(
                    f"{name} is a TorchScript archive, a program with its weights",
                    "save the weights alone where it was made: torch.save(network.state_dict(), FILE)",
                )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of old files
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if zipped:
            return _load_tensors(content)
        if _ends(content):
            raise _more_than_weights(name) from None
        raise


def _load_tensors(content: bytes) -> object:
    """What torch.save wrote, with an `_Unread` in the place of each object that is not a tensor or a container."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = SimpleNamespace(__name__="tensors", Unpickler=_TensorUnpickler)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=False, pickle_module=module)


def _more_than_weights(name: str) -> ClassifierError:
    return ClassifierError(f"{name} holds more than weights, which could run code when loaded", _REMEDY)


def _ends(content: bytes) -> bool:
    """Whether the pickles of an old file are complete: if truncated in a class name, they seem to name another."""
    stream = io.BytesIO(content)
    try:
        for _ in range(4):  # a magic number, a version, the system, the object; opcodes are listed, not executed
            for _ in pickletools.genops(stream):
                pass
    except MemoryError:
        raise
    except Exception:  # pickletools raises many types for what is not a pickle
        return False
    return True


def _tensors_of(loaded: object, name: str) -> dict[str, Tensor]:
    """The tensors by name; where there are several sets of them, each name has that of its set before it."""
    found = _state_dicts(loaded)
    if found:
        alone = len(found) == 1
        return {key if alone else where + key: value for where, inner in found.items() for key, value in inner.items()}
    if not isinstance(loaded, Mapping) or not loaded:
        if isinstance(loaded, _Unread):
            raise _more_than_weights(name)
        what = "nothing" if isinstance(loaded, Mapping) else f"a {type(loaded).__name__}"
        raise ClassifierError(f"{name} holds {what} in place of tensors by name", _REMEDY)
    if any(isinstance(value, _Unread) for value in loaded.values()):
        raise _more_than_weights(name)
    odd = next(key for key, value in loaded.items() if not (isinstance(key, str) and isinstance(value, Tensor)))
    raise ClassifierError(
        f"{name} has '{printable(str(odd))}' ({type(loaded[odd]).__name__}) among its tensors", _REMEDY
    )


def _state_dicts(loaded: object, where: str = "", depth: int = 0) -> dict[str, Mapping[str, Tensor]]:
    """The sets of tensors by name in what a file holds, each by the keys that lead to it, such as "state_dict."."""
    if not isinstance(loaded, Mapping) or not loaded or depth > _DEEPEST:
        return {}
    if all(isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()):
        has_weights = not where or any(tensor.ndim > 1 for tensor in loaded.values())  # not a metric's counters
        return {where: loaded} if has_weights else {}
    found: dict[str, Mapping[str, Tensor]] = {}
    for key, value in loaded.items():
        if isinstance(key, str) and "optim" not in key:  # an optimizer has tensors by the names of parameters, too
            found |= _state_dicts(value, f"{where}{key}.", depth + 1)
    return found
