"""The card of a classifier file: all that inference needs apart from the weights, as plain JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from bnlab.data.preprocess import Preprocessing
from bnlab.data.split_csv import as_label
from bnlab.errors import ClassifierError, printable

FORMAT_VERSION = 2

# A file may come from anywhere, so its card is checked; keys that this version does not know are ignored.
_CHECKED = ConfigDict(extra="ignore", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=_CHECKED)
class Card:
    """The header of a classifier file."""

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
        raise unreadable_card(name, error) from None
    return card


def unreadable_card(name: str, error: Exception) -> ClassifierError:
    """The error for a card that is not valid, for this reason."""
    reason = str(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        reason = f"{printable('.'.join(map(str, first['loc'])))}: {first['msg'][0].lower()}{first['msg'][1:]}"
    return ClassifierError(f"{name} has a card that cannot be read ({reason})", "train or copy it again")
