"""The card of a classifier: all that inference needs beside the weights, as plain JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bnlab.data.pixels import View
from bnlab.errors import ClassifierError

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Card:
    """What stands in the header of a classifier file."""

    network: str
    """name of the network"""
    arguments: Mapping[str, Any]
    """what the network is built with, beside its classes"""
    classes: tuple[str, ...]
    """class names; the position is the index of the logit"""
    view: View
    """how a photo becomes the network's input"""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """what was measured when it was saved, with the side of the split and n"""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """every setting of its training"""
    versions: Mapping[str, str] = field(default_factory=dict)
    """of the packages it was trained with"""


def to_json(card: Card) -> str:
    """The card as JSON, the same text for the same card."""
    return json.dumps({"format": FORMAT_VERSION} | asdict(card))


def from_json(text: str, name: str) -> Card:
    """The card from JSON; `name` is what messages call the file.

    Raises:
        ClassifierError: a newer format, or no such card.
    """
    try:
        values = json.loads(text)
        version = values.pop("format")
        if version > FORMAT_VERSION:
            raise ClassifierError(
                f"{name} has classifier format {version}, and this bnlab reads up to {FORMAT_VERSION}", "upgrade bnlab"
            )
        view = values["view"]
        values["view"] = View(**view | {"mean": tuple(view["mean"]), "std": tuple(view["std"])})
        values["classes"] = tuple(values["classes"])
        return Card(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ClassifierError(f"{name} has a card that cannot be read ({error})", "train or copy it again") from None
