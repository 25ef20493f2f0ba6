"""Reads and writes the classifier file: safetensors weights with the card in the header. Nothing in it is executed."""

import inspect
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from bnlab.classifier import card as cards
from bnlab.classifier.card import Card
from bnlab.errors import ClassifierError, UsageError, printable
from bnlab.files import write_atomic
from bnlab.nets import NETWORKS, build
from bnlab.nets.network import TableNetwork

CARD_KEY = "bnlab"
_PICKLES = (b"PK\x03\x04", b"\x80")  # torch.save's zip, and a bare pickle


def save_classifier(path: Path, network: TableNetwork, card: Card) -> None:
    """Write the network's inference weights and the card: atomically, and the same bytes for the same classifier.

    Raises:
        UsageError: the network was built with a normalisation of the caller's own, which a card cannot name.
        StorageError: no space left or no permission; an older file is untouched.
    """
    if network.arguments["norm"] is None:
        raise UsageError(
            "a network with a normalisation of your own cannot be saved as a classifier file", "save its state_dict()"
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.inference_state().items()}
    write_atomic(path, safetensors.torch.save(tensors, {CARD_KEY: cards.to_json(card)}))


def read_classifier(path: Path) -> tuple[dict[str, Tensor], Card]:
    """The tensors and the card of a classifier file.

    Raises:
        ClassifierError: the file is missing, truncated, a pickle, of another format, or not a classifier file.
    """
    name = printable(path)
    content = read_content(path, "classifier file", f"pass the file, such as {name}/best.safetensors")
    if is_pickle(content):
        raise ClassifierError(
            f"{name} is a pickle, which can run code when it is loaded",
            "use a .safetensors file: bnlab import makes one",
        )
    try:
        tensors, metadata = parse_safetensors(content)
    except (SafetensorError, ValueError) as error:
        raise ClassifierError(f"{name} is not a complete classifier file ({error})", "copy or train it again") from None
    if CARD_KEY not in metadata:
        raise ClassifierError(f"{name} holds weights but no bnlab card", "use a .safetensors file that bnlab wrote")
    return tensors, cards.from_json(metadata[CARD_KEY], name)


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


def load_network(path: Path) -> tuple[TableNetwork, Card]:
    """The network of a classifier file, in evaluation mode on the CPU, and its card.

    Raises:
        ClassifierError: as `read_classifier`, or the tensors do not fit the network that the card names.
    """
    tensors, card = read_classifier(path)
    network = _build(card, printable(path))
    expected = network.state_dict()
    _check_fit(tensors, expected, printable(path), card.network)
    network.load_state_dict({key: tensors[key].to(expected[key].dtype) for key in expected}, assign=True)
    return network.eval(), card


def _build(card: Card, name: str) -> TableNetwork:
    """The network that a card describes, on the meta device, without weights; `name` is what messages call its file."""
    unknown = sorted(card.arguments.keys() - inspect.signature(build).parameters.keys())
    if card.network not in NETWORKS or unknown:
        what = f"with {printable(', '.join(unknown))}" if unknown else f"'{printable(card.network)}'"
        raise ClassifierError(f"{name} holds a network {what}, which this bnlab does not know", "upgrade bnlab")
    arguments: dict[str, Any] = dict(card.arguments)
    try:
        with torch.device("meta"):  # a card may name any width: nothing is allocated before the tensors fit
            return build(card.network, classes=len(card.classes), **arguments)
    except (UsageError, TypeError, ValueError, RuntimeError) as error:  # of any types and sizes
        raise cards.unreadable_card(name, error) from None


def _check_fit(tensors: dict[str, Tensor], expected: dict[str, Tensor], name: str, network: str) -> None:
    """Refuse tensors that are missing, unknown or of another shape; the message names the first."""
    remedy = "train or copy it again"
    for key in [*expected, *tensors]:
        if key not in tensors:
            raise ClassifierError(f"{name} lacks the tensor {key} of {network}", remedy)
        if key not in expected:
            raise ClassifierError(f"{name} has a tensor {printable(key)}, which {network} does not have", remedy)
        if tensors[key].shape != expected[key].shape:
            shapes = f"{list(tensors[key].shape)}, and {network} needs {list(expected[key].shape)}"
            raise ClassifierError(f"the tensor {key} of {name} has the shape {shapes}", remedy)
