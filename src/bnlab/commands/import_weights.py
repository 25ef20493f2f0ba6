"""`bnlab import`: turn weights from elsewhere into a classifier file. Code in them is never run."""

from dataclasses import dataclass
from typing import Any

from bnlab.classifier.file import CARD_KEY, Card, check_new_file, save_classifier
from bnlab.config import Settings, load_settings, with_changes
from bnlab.data.class_names import read_classes
from bnlab.data.preprocess import Preprocessing
from bnlab.data.scan import Result
from bnlab.errors import ClassifierError, UsageError, did_you_mean, plural, printable, quoted
from bnlab.files import storage_errors
from bnlab.machine import versions
from bnlab.nets.convert import Conversion, convert
from bnlab.nets.registry import ARCHITECTURE_KEYS, has_row
from bnlab.nets.tables import LocalResponse
from bnlab.nets.weights import read_weights
from bnlab.options import ImportOptions
from bnlab.progress import LoggedProgress, Progress
from bnlab.training.no_effect import Situation, without_effect

PREPROCESSING_KEYS = ("size", "resize", "crop_fraction", "mean", "std")
_NOT_IN_TENSORS = ("activation", "placement", "norm_eps", "local_response")  # they change outputs all the same
_MOST_NAMED = 20  # warnings about tensors that do not match


@dataclass(frozen=True, kw_only=True)
class ImportResult(Result):
    options: ImportOptions
    card: Card
    conversion: Conversion

    def __repr__(self) -> str:
        return self._line(f"{self.options.output}", self.card.network, plural(len(self.card.classes), "class"))

    def to_json(self) -> dict[str, Any]:
        return {
            "classifier": str(self.options.output),
            "format": self.conversion.format.name,
            "network": self.card.network,
            "variant": self.card.arguments["variant"],
            "classes": len(self.card.classes),
            "tensors": self.conversion.tensors,
            "prefix": self.conversion.prefix,
            "dropped": list(self.conversion.dropped),
            "other_tensors": list(self.conversion.others),
            "merged_biases": self.conversion.merged,
        }


def run(options: ImportOptions, progress: Progress) -> ImportResult:
    """Read the weights, recognise their network, and write the classifier file."""
    progress = LoggedProgress(progress)
    name = printable(options.file)
    check_new_file(options.output, "output")
    given = _read_recipe_keys(options)
    labels = read_classes(options.classes) if options.classes else None
    tensors, metadata = read_weights(options.file)
    if CARD_KEY in metadata:
        raise ClassifierError(
            f"{name} is a bnlab classifier already", f"use it: bnlab evaluate {quoted(options.file)} DATA"
        )
    conversion = convert(
        tensors,
        file=name,
        format=options.format,
        network=given.recipe.network if "network" in given.own else None,
        prefix=options.prefix,
        options={key: getattr(given.recipe, key) for key in ARCHITECTURE_KEYS if key in given.own},
    )
    _check_fit(conversion, name, progress)
    rows = conversion.network.fc.out_features
    if labels is None:
        labels = tuple(map(str, range(rows)))
        progress.warn(f"the classes are called 0 to {rows - 1}: pass a file of their names as classes")
    elif len(labels) != rows:
        raise ClassifierError(
            f"{printable(str(options.classes))} has {plural(len(labels), 'name')}, and "
            f"{printable(conversion.last_layer)} of {name} has {plural(rows, 'row')}",
            "pass one name for each row, in their order",
        )
    card = Card(
        network=conversion.network.name,
        arguments=conversion.network.arguments,
        classes=labels,
        preprocessing=_preprocessing(given, conversion, name, progress),
        recipe={"imported_from": printable(options.file.name), "format": conversion.format.name},
        versions=versions(),
    )
    with storage_errors(options.output):
        options.output.parent.mkdir(parents=True, exist_ok=True)
    save_classifier(options.output, conversion.network, card)
    return ImportResult(options=options, card=card, conversion=conversion, warnings=tuple(progress.warnings))


def _read_recipe_keys(options: ImportOptions) -> Settings:
    known = ["network", *ARCHITECTURE_KEYS, *PREPROCESSING_KEYS, "pixel_range"]
    keys = ({} if options.network is None else {"network": options.network}) | dict(options.recipe_keys)
    for key in keys:
        if key not in known:
            raise UsageError(f"import has no use for the key '{printable(key)}'", did_you_mean(key, known))
    return load_settings("default", keys)


def _preprocessing(given: Settings, conversion: Conversion, name: str, progress: Progress) -> Preprocessing:
    """The preprocessing: from the options, else as is usual for this format, else from the default recipe."""
    usual = conversion.format.preprocessing
    settings = with_changes(given, {key: usual[key] for key in usual if key not in given.own}, conversion.format.name)
    for line in without_effect(settings, Situation(recipe=settings.recipe, network=conversion.network)):
        progress.warn(line)
    no_use = {"crop_fraction"} if settings.recipe.resize == "squash" else set()
    no_use |= set() if has_row(conversion.network.name, LocalResponse) else {"local_response"}
    open_keys = [key for key in (*PREPROCESSING_KEYS, *_NOT_IN_TENSORS) if key not in given.own | no_use]
    if not usual and open_keys:
        progress.warn(
            f"{name} does not contain {', '.join(open_keys)}: they are taken from the default recipe or the network; "
            "if it was trained with others, pass them"
        )
    values = {key: getattr(settings.recipe, key) for key in PREPROCESSING_KEYS}
    return Preprocessing(**values, pixel_range=settings.recipe.pixel_range)


def _check_fit(conversion: Conversion, name: str, progress: Progress) -> None:
    mismatches, network = conversion.mismatches, conversion.network
    for line in mismatches[:_MOST_NAMED]:
        progress.warn(line)
    if len(mismatches) > _MOST_NAMED:
        progress.warn(f"and {len(mismatches) - _MOST_NAMED} more")
    if mismatches:
        verb = "does" if len(mismatches) == 1 else "do"
        raise ClassifierError(
            f"{name} is most similar to {network.name} (variant {network.arguments['variant']}), and "
            f"{plural(len(mismatches), 'tensor')} {verb} not match",
            "pass its name as network, and keys of the recipe such as width=0.5",
        )
