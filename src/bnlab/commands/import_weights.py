"""`bnlab import`: weights from elsewhere become a classifier file. Nothing in them is ever run."""

import json
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnlab.classifier.card import Card
from bnlab.classifier.file import save_classifier
from bnlab.classifier.weights import read_weights
from bnlab.config import Settings, load_settings, with_changes
from bnlab.data.preprocess import Preprocessing
from bnlab.data.split_csv import as_label
from bnlab.errors import ClassifierError, UsageError, did_you_mean, plural, printable
from bnlab.files import storage_errors
from bnlab.machine import versions
from bnlab.nets.convert import Conversion, convert
from bnlab.nets.registry import ARCHITECTURE_KEYS, has_row
from bnlab.nets.tables import LocalResponse
from bnlab.progress import Progress

VIEW_KEYS = ("size", "resize", "crop_fraction", "mean", "std")
_UNSEEN = ("activation", "placement", "norm_eps", "local_response")  # they change outputs, and no tensor shows them
_MOST_NAMED = 20  # tensors that do not match


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """What `bnlab import` is told."""

    file: Path
    """weights: of torch.save, or safetensors"""
    output: Path
    """the classifier file to write; it must not exist"""
    classes: Path | None = None
    """names of the classes: JSON, or a name a line; numbers unless given"""
    format: str | None = None
    """what wrote the file: a name in `nets.foreign.FORMATS`; guessed unless given"""
    options: Mapping[str, Any] = field(default_factory=dict)
    """keys of a recipe: network, those of its shape, and those of its view; they win over what the file looks like"""


@dataclass(frozen=True, kw_only=True)
class ImportResult:
    """The classifier file, and what the weights were taken for."""

    settings: ImportSettings
    card: Card
    conversion: Conversion

    def to_json(self) -> dict[str, Any]:
        """The document of `bnlab import --json`."""
        return {
            "classifier": str(self.settings.output),
            "format": self.conversion.format.name,
            "network": self.card.network,
            "variant": self.card.arguments["variant"],
            "classes": len(self.card.classes),
            "tensors": self.conversion.tensors,
            "dropped": list(self.conversion.dropped),
            "merged_biases": self.conversion.merged,
        }


def run(settings: ImportSettings, progress: Progress) -> ImportResult:
    """Read the weights, find out what they are of, and write the classifier file.

    Raises:
        UsageError: the output exists, an option cannot be, or the classes' names cannot be used.
        ClassifierError: the file holds no weights, or those of no network that bnlab knows.
        StorageError: no space left or no permission; nothing is left behind.
    """
    name = printable(settings.file)
    _check_output(settings.output)
    given = _told(settings.options)
    labels = _read_classes(settings.classes) if settings.classes else None
    conversion = convert(
        read_weights(settings.file),
        file=name,
        format=settings.format,
        network=given.recipe.network if "network" in given.own else None,
        options={key: getattr(given.recipe, key) for key in ARCHITECTURE_KEYS if key in given.own},
    )
    _check_fit(conversion, name, progress)
    labels = _check_classes(settings, labels, conversion, progress)
    card = Card(
        network=conversion.network.name,
        arguments=conversion.network.arguments,
        classes=labels,
        preprocessing=_view(given, conversion, name, progress),
        recipe={"imported_from": printable(settings.file.name), "format": conversion.format.name},
        versions=versions(),
    )
    with storage_errors(settings.output):
        settings.output.parent.mkdir(parents=True, exist_ok=True)
    save_classifier(settings.output, conversion.network, card)
    return ImportResult(settings=settings, card=card, conversion=conversion)


def _check_output(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise UsageError(f"{printable(path)} does not end in .safetensors", "give --output such a name")
    if os.path.lexists(path):
        raise UsageError(f"{printable(path)} exists already", "give --output a new file")


def _told(options: Mapping[str, Any]) -> Settings:
    """The options, checked as a recipe's keys."""
    known = ["network", *ARCHITECTURE_KEYS, *VIEW_KEYS]
    for key in options:
        if key not in known:
            raise UsageError(f"import has no use for the key '{printable(key)}'", did_you_mean(key, known))
    return load_settings("default", options)


def _view(given: Settings, conversion: Conversion, name: str, progress: Progress) -> Preprocessing:
    """How the network sees a photo: as told, else as files of this kind have it, else as the default recipe."""
    usual = conversion.format.preprocessing
    settings = with_changes(given, {key: usual[key] for key in usual if key not in given.own}, conversion.format.name)
    for line in settings.without_effect():
        progress.warn(line)
    no_use = {"crop_fraction"} if settings.recipe.resize == "squash" else set()
    no_use |= set() if has_row(conversion.network.name, LocalResponse) else {"local_response"}
    open_keys = [key for key in (*VIEW_KEYS, *_UNSEEN) if key not in given.own | no_use]
    if not usual and open_keys:
        progress.warn(
            f"{name} does not tell {', '.join(open_keys)}: they are the default recipe's, or the network's own; where "
            "it was trained with others, give them with --set KEY=VALUE"
        )
    return Preprocessing(**{key: getattr(settings.recipe, key) for key in VIEW_KEYS})


def _check_fit(conversion: Conversion, name: str, progress: Progress) -> None:
    mismatches, network = conversion.mismatches, conversion.network
    for line in mismatches[:_MOST_NAMED]:
        progress.warn(line)
    if len(mismatches) > _MOST_NAMED:
        progress.warn(f"and {len(mismatches) - _MOST_NAMED} more")
    if mismatches:
        verb = "does" if len(mismatches) == 1 else "do"
        raise ClassifierError(
            f"{name} is nearest to {network.name} (variant {network.arguments['variant']}), and "
            f"{plural(len(mismatches), 'tensor')} {verb} not match",
            "say what it is with --network and --set, such as --set width=0.5",
        )


def _check_classes(
    settings: ImportSettings, labels: Sequence[str] | None, conversion: Conversion, progress: Progress
) -> tuple[str, ...]:
    rows = conversion.network.fc.out_features
    if labels is None:
        progress.warn(f"the classes are called 0 to {rows - 1}: give their names with --classes FILE")
        return tuple(map(str, range(rows)))
    if len(labels) != rows:
        raise ClassifierError(
            f"{printable(str(settings.classes))} has {plural(len(labels), 'name')}, and "
            f"{printable(conversion.last_layer)} of {printable(settings.file)} has {plural(rows, 'row')}",
            "give one name for each row, in their order",
        )
    return tuple(labels)


def _read_classes(path: Path) -> tuple[str, ...]:
    """The names, in the order of the logits: of JSON ({"0": name, ...} or a list), or of lines.

    Raises:
        UsageError: the file cannot be read, its keys are not 0 to n - 1, a name is no text or there twice.
    """
    where = printable(path)
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UsageError(f"{where} cannot be read ({reason})", "give --classes a JSON file, or a name a line") from None
    try:
        names: Any = json.loads(text)
    except (ValueError, RecursionError):
        if path.suffix == ".json":
            raise UsageError(f"{where} is no JSON", 'say {"0": "daisy", ...}, or ["daisy", ...]') from None
        names = None
    if isinstance(names, dict):
        wanted = [str(i) for i in range(len(names))]
        missing = next((key for key in wanted if key not in names), None)
        if missing is not None:
            raise UsageError(f"{where} has no class {missing}", f"number its {len(names)} names 0 to {len(names) - 1}")
        names = [names[key] for key in wanted]
    elif not isinstance(names, list):
        names = [line.strip() for line in text.splitlines() if line.strip()]
    labels: dict[str, int] = {}
    for number, label in enumerate(names):
        if not isinstance(label, str) or not label.strip() or any(unicodedata.category(c) == "Cs" for c in label):
            raise UsageError(f"{where} has no text as the name of class {number}", "give every class a name")
        if (first := labels.setdefault(as_label(label), number)) != number:
            raise UsageError(f"{where} calls classes {first} and {number} both '{printable(label)}'", "name them apart")
    if not labels:
        raise UsageError(f"{where} names no classes", "give --classes a JSON file, or a name a line")
    return tuple(labels)
