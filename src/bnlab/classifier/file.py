"""Reads and writes the classifier file: safetensors weights with the card in the header. Nothing in it is executed."""

import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from torch import Tensor

from bnlab.classifier.seen import CHECKED, Ancestor, SeenPhotos
from bnlab.data.preprocess import Preprocessing
from bnlab.data.split_csv import as_label
from bnlab.errors import ClassifierError, UsageError, plural, printable
from bnlab.files import write_atomic
from bnlab.nets import NETWORKS, build
from bnlab.nets.network import TableNetwork
from bnlab.nets.weights import is_pickle, parse_safetensors, read_content
from bnlab.runs import Run

FORMAT_VERSION = 2
CARD_KEY = "bnlab"


# A file may come from anywhere, so its card is checked; keys that this version does not know are ignored.
@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Card:
    """The header of a classifier file: all that inference needs apart from the weights, as plain JSON."""

    network: str
    arguments: Mapping[str, str | bool | int | float | None]
    """arguments of `bnlab.nets.build` for this network, apart from its classes"""
    classes: Annotated[tuple[Annotated[str, Field(strict=True)], ...], Field(min_length=1)]
    """class names, in the order of the logits"""
    preprocessing: Preprocessing
    metrics: Mapping[str, Any] = Field(default_factory=dict)
    """validation when it was saved, with the split and n"""
    recipe: Mapping[str, Any] = Field(default_factory=dict)
    """every setting of its training"""
    versions: Mapping[str, str] = Field(default_factory=dict)
    """versions of the packages it was trained with"""
    split_sha256: str = ""
    """SHA-256 of the split.csv it was trained with"""
    photos: Mapping[str, int] = Field(default_factory=dict)
    """number of photos in train, val and test of that split; empty if it is not known"""
    ancestors: tuple[Ancestor, ...] = ()
    """the trainings from whose weights it started, the first one first"""
    seen: SeenPhotos = Field(default_factory=SeenPhotos)
    """the photos that it and its ancestors were trained on; an older file does not say, so there may be others"""


def to_json(card: Card) -> str:
    """The card as JSON, the same text for the same card."""
    return json.dumps({"format": FORMAT_VERSION} | asdict(card))


def from_json(text: str, name: str) -> Card:
    """The card from JSON; `name` is what messages call the file.

    Raises:
        ClassifierError: an older or a newer format, or not a card.
    """
    try:
        values = json.loads(text)
        version = values.pop("format")
        if version < 1:
            raise ValueError(f"format {version}")
        if version != FORMAT_VERSION:
            older = version < FORMAT_VERSION
            raise ClassifierError(
                f"{name} was written by {'an older' if older else 'a newer'} bnlab (classifier format {version}, this "
                f"bnlab reads format {FORMAT_VERSION})",
                "train it again" if older else "upgrade bnlab",
            )
        card = TypeAdapter(Card).validate_python(values)
        if len({as_label(label) for label in card.classes}) < len(card.classes):
            raise ValueError("its classes are not distinct")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable_card(name, error) from None
    return card


def _unreadable_card(name: str, error: Exception) -> ClassifierError:
    """The error for a card that is not valid, for this reason."""
    reason = str(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        reason = f"{printable('.'.join(map(str, first['loc'])))}: {first['msg'][0].lower()}{first['msg'][1:]}"
    return ClassifierError(f"{name} has a card that cannot be read ({reason})", "train or copy it again")


def check_new_file(path: Path, where: str = "save") -> None:
    """Refuse a path to which no classifier file may be written; `where` is what the remedy tells to pass another to.

    Raises:
        UsageError: it does not end in .safetensors, or something has that name.
    """
    if path.suffix != ".safetensors":
        raise UsageError(f"{printable(path)} does not end in .safetensors", f"pass such a name to {where}")
    if os.path.lexists(path):
        raise UsageError(f"{printable(path)} exists already", f"pass a new file to {where}")


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
    write_atomic(path, safetensors.torch.save(tensors, {CARD_KEY: to_json(card)}))


def file_of(path: str | PathLike[str]) -> Path:
    """The classifier file at a path, which may also be the folder of a run: then its best.safetensors."""
    best = Run(Path(path)).best
    return best if best.is_file() else Path(path)


def read_classifier(path: Path) -> tuple[dict[str, Tensor], Card]:
    """The tensors and the card of a classifier file.

    Raises:
        ClassifierError: the file is missing, truncated, a pickle, of another format, or not a classifier file.
    """
    name = printable(path)
    content = read_content(path, "classifier file", "pass a classifier file, or a run's folder with best.safetensors")
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
    return tensors, from_json(metadata[CARD_KEY], name)


def load_network(path: Path) -> tuple[TableNetwork, Card]:
    """The network of a classifier file, in evaluation mode on the CPU, and its card.

    Raises:
        ClassifierError: as `read_classifier`, or the tensors do not fit the network that the card names.
    """
    tensors, card = read_classifier(path)
    name = printable(path)
    network = _build(card, name)
    expected = network.state_dict()
    if problem := misfit(tensors, expected, card.network, name):
        raise ClassifierError(problem, "train or copy it again")
    network.load_state_dict({key: tensors[key].to(expected[key].dtype) for key in expected}, assign=True)
    return network.eval(), card


def describe(network: TableNetwork, card: Card) -> Card:
    """The card with this network, whose weights fit it.

    Raises:
        UsageError: no card can describe the network, because its layers are not those that `build` makes.
    """
    remedy = "save its state_dict()"
    if not isinstance(network, TableNetwork) or network.arguments["norm"] is None:
        raise UsageError(f"a {type(network).__name__} of your own cannot be saved as a classifier file", remedy)
    card = replace(card, network=network.name, arguments=network.arguments)
    expected = _build(card, "the card").state_dict()
    if problem := misfit(network.inference_state(), expected, card.network, "the classifier's network"):
        raise UsageError(f"{problem} for {plural(len(card.classes), 'class')}", remedy)
    return card


def misfit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], network: str, name: str) -> str | None:
    """What is wrong with the tensors of `name` for that network, if anything."""
    for key in [*expected, *tensors]:
        if key not in tensors:
            return f"{name} lacks the tensor {key} of {network}"
        if key not in expected:
            return f"{name} has a tensor {printable(key)}, which {network} does not have"
        if tensors[key].shape != expected[key].shape:
            shapes = f"{list(tensors[key].shape)}, and {network} needs {list(expected[key].shape)}"
            return f"the tensor {key} of {name} has the shape {shapes}"
    return None


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
        raise _unreadable_card(name, error) from None
