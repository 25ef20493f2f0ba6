"""The card of a classifier: all that inference needs beside the weights, as plain JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from bnlab.data.preprocess import Preprocessing
from bnlab.data.split_csv import as_label
from bnlab.errors import ClassifierError, printable

FORMAT_VERSION = 1

# A file may come from anywhere, so its card is checked; keys of later versions of the same format are passed over.
_CHECKED = ConfigDict(extra="ignore", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=_CHECKED)
class Card:
    """What stands in the header of a classifier file."""

    network: str
    """name of the network"""
    arguments: Mapping[str, str | bool | int | float | None]
    """what the network is built with, beside its classes: arguments of `bnlab.nets.build`"""
    classes: Annotated[tuple[Annotated[str, Field(strict=True)], ...], Field(min_length=1)]
    """class names; the position is the index of the logit"""
    preprocessing: Preprocessing
    """how a photo becomes the network's input"""
    metrics: Mapping[str, Any] = Field(default_factory=dict)
    """what was measured when it was saved, with the side of the split and n"""
    recipe: Mapping[str, Any] = Field(default_factory=dict)
    """every setting of its training"""
    versions: Mapping[str, str] = Field(default_factory=dict)
    """of the packages it was trained with"""
    split_sha256: str = ""
    """of the split.csv it was trained by"""


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
        card = TypeAdapter(Card).validate_python(values)
        if version < 1 or len({as_label(label) for label in card.classes}) < len(card.classes):
            raise ValueError("its classes are not distinct" if version == 1 else f"format {version}")
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{printable('.'.join(map(str, first['loc'])))}: {first['msg'][0].lower()}{first['msg'][1:]}"
        raise ClassifierError(f"{name} has a card that cannot be read ({reason})", "train or copy it again") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ClassifierError(f"{name} has a card that cannot be read ({error})", "train or copy it again") from None
    return card
