"""Reads weights that other programs wrote: pickles of tensors alone, and safetensors. Nothing in them is executed."""

import io
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bnlab.classifier.file import CARD_KEY, is_pickle, parse_safetensors, read_content
from bnlab.errors import ClassifierError, OutOfMemoryError, printable, quoted
from bnlab.machine import is_out_of_memory

_WRAPPERS = ("state_dict", "model", "net", "model_state_dict")
_REMEDY = "save the state_dict() of the network alone: torch.save(network.state_dict(), FILE)"


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by the names they have there.

    Raises:
        ClassifierError: the file cannot be read, or holds anything but weights.
    """
    name = printable(path)
    content = read_content(path, "file", "pass a file of weights")
    try:
        if is_pickle(content):
            return _tensors_of(_load_pickle(content, name), name)
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
    if CARD_KEY in metadata:
        raise ClassifierError(f"{name} is a bnlab classifier already", f"use it: bnlab evaluate {quoted(path)} DATA")
    return _tensors_of(tensors, name)


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
        if zipped or _ends(content):
            raise ClassifierError(
                f"{name} holds more than weights, which could run code when loaded", _REMEDY
            ) from None
        raise


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
    for _ in _WRAPPERS:  # they may be nested, such as {"model": {"state_dict": ...}}
        inner = next((loaded[key] for key in _WRAPPERS if key in loaded), None) if isinstance(loaded, Mapping) else None
        if not isinstance(inner, Mapping):
            break
        loaded = inner
    if not isinstance(loaded, Mapping) or not loaded:
        what = "nothing" if isinstance(loaded, Mapping) else f"a {type(loaded).__name__}"
        raise ClassifierError(f"{name} holds {what} in place of tensors by name", _REMEDY)
    for key, value in loaded.items():
        if not isinstance(value, Tensor):
            raise ClassifierError(
                f"{name} has '{printable(str(key))}' ({type(value).__name__}) among its tensors", _REMEDY
            )
    return {str(key): value for key, value in loaded.items()}
