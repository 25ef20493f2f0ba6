"""Opens what a verb takes as MODEL, a classifier file or a network of the caller's code, and writes its like."""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from bnlab.classifier.file import Card, check_new_file, describe, save_classifier
from bnlab.classifier.predict import Classifier
from bnlab.classifier.seen import SeenPhotos
from bnlab.data.class_names import read_classes
from bnlab.data.photo_batches import PhotoBatches
from bnlab.data.photo_file import PhotoReader
from bnlab.data.photos import Photo, Photos
from bnlab.data.preprocess import Preprocessing
from bnlab.errors import ClassifierError, UsageError, plural, printable
from bnlab.files import file_sha256, storage_errors, write_atomic
from bnlab.nets.factory import build_model
from bnlab.nets.load_weights import load_weights
from bnlab.nets.network import TableNetwork
from bnlab.norm.recalibrate import evaluation_mode
from bnlab.options import DoctorOptions, FreezeOptions, ModelOptions, RecalibrateOptions

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
OF_CODE = ("weights", "prefix", "classes", "size", "resize", "mean", "std")
"""options that have an effect on the network that code makes alone"""
_SUFFIXES = (".safetensors", ".pt", ".pth")


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A network, and how photos become its input."""

    name: str
    network: nn.Module
    classes: tuple[str, ...] | None
    """in the order of its outputs; None: those of the folders"""
    preprocessing: Preprocessing
    card: Card | None = None
    checkpoint: Path | None = None
    """file of the weights"""


def open_model(options: ModelOptions) -> OpenedModel:
    """The classifier, or the network that the caller's code makes, with its weights.

    Raises:
        UsageError: MODEL names no network, or an option has no effect on it.
        ClassifierError: the file or the weights cannot be read, or do not fit.
    """
    if is_code(options.model):
        return _from_code(options)
    path = Path(options.model)
    given = [name for name in OF_CODE if getattr(options, name) is not None]
    if given:
        raise UsageError(f"{given[0]} has no effect on a classifier file, which knows it", f"leave {given[0]} out")
    if path.suffix == ".py":
        raise UsageError(
            f"'{printable(path)}' does not say which network to build",
            f"name the function that makes it: {printable(path)}:NAME",
        )
    if path.is_file() and path.suffix != ".safetensors":
        raise UsageError(
            f"{printable(path)} is not a classifier file",
            "name the code that makes the network, PATH.py:NAME, and pass this file as weights",
        )
    return open_classifier(path)


def open_classifier(path: Path) -> OpenedModel:
    """A classifier file, or the best one of a run folder.

    Raises:
        ClassifierError: as `Classifier.load`.
    """
    classifier = Classifier.load(path, "cpu")
    return OpenedModel(
        name=printable(classifier.path or path),
        network=classifier.network,
        classes=classifier.classes,
        preprocessing=classifier.card.preprocessing,
        card=classifier.card,
        checkpoint=classifier.path,
    )


def _from_code(options: ModelOptions) -> OpenedModel:
    network = build_model(options.model)
    if options.weights is not None:
        ends = not options.prefix or options.prefix.endswith(".")
        load_weights(network, options.weights, prefix=options.prefix if ends else f"{options.prefix}.")
    elif options.prefix is not None:
        raise UsageError("prefix has no effect without weights", "pass weights, or leave prefix out")
    preprocessing = Preprocessing(
        size=options.size or 224,
        resize=options.resize or "crop",
        crop_fraction=0.875 if options.resize != "squash" else 1.0,
        mean=_colour(options.mean, MEAN, "mean"),
        std=_colour(options.std, STD, "std"),
    )
    return OpenedModel(
        name=printable(options.model),
        network=network,
        classes=read_classes(options.classes) if options.classes else None,
        preprocessing=preprocessing,
        checkpoint=options.weights,
    )


def _colour(text: str | None, default: tuple[float, float, float], name: str) -> tuple[float, float, float]:
    if text is None:
        return default
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) == 1:
        values *= 3
    inside = all(0 <= value <= 1 for value in values)  # False for NaN
    if len(values) != 3 or not inside or (name == "std" and min(values) == 0):
        raise UsageError(
            f"{name} '{printable(text)}' is not three numbers in 0..1",
            f"pass R,G,B divided by 255, such as {','.join(map(str, default))}",
        )
    return values


def check_classes(data: Path, photos: Photos, classes: Sequence[str], model: OpenedModel) -> None:
    unknown = sorted(set(photos.labels) - set(classes))
    if unknown:
        names = ", ".join(printable(name) for name in unknown[:5])
        raise ClassifierError(
            f"{printable(data)} has {plural(len(unknown), 'class')} that the model does not know ({names})",
            f"it knows {', '.join(printable(name) for name in classes[:20])}; rename or remove the others",
        )
    outputs = None if model.card is not None else _outputs(model)
    if outputs is not None and outputs != len(classes):
        raise ClassifierError(
            f"the network has {outputs} outputs, but {printable(data)} has {len(classes)} classes",
            "pass its class names in the order of its outputs as classes, or the network for these classes",
        )


@torch.no_grad()
def _outputs(model: OpenedModel) -> int | None:
    """How many values the network gives for an image; None if that is not a tensor N x outputs, or it fails."""
    size = model.preprocessing.size
    with evaluation_mode(model.network):
        try:
            output = model.network(torch.zeros(2, 3, size, size))  # N x outputs
        except Exception:  # of any type: the code of others. The diagnosis says what is wrong
            return None
    return output.shape[1] if isinstance(output, Tensor) and output.ndim == 2 else None


def is_code(model: str) -> bool:
    """Whether MODEL names code that makes a network, and not a file or folder."""
    return ":" in model and not Path(model).exists()


def check_output(path: Path, model: str, option: str) -> None:
    """Refuse a path to which what becomes of MODEL may not be written; `option` is what the remedy names.

    Raises:
        UsageError: it has another suffix than its kind of file, or something has that name.
    """
    if not is_code(model):
        check_new_file(path, option)
        return
    if path.suffix not in _SUFFIXES:
        raise UsageError(f"{printable(path)} ends in none of {', '.join(_SUFFIXES)}", f"pass such a name to {option}")
    if os.path.lexists(path):
        raise UsageError(f"{printable(path)} exists already", f"pass a new file to {option}")


def photo_batches(
    model: OpenedModel,
    photos: Photos,
    classes: Sequence[str],
    options: DoctorOptions | RecalibrateOptions | FreezeOptions,
) -> PhotoBatches:
    """Batches of some of the photos, preprocessed for the model, with labels in the order of `classes`."""
    return PhotoBatches(
        photos=photos,
        classes=classes,
        preprocessing=model.preprocessing,
        batch_size=options.batch_size,
        images=options.images,
        workers=options.workers,
        reader=PhotoReader(max_megapixels=options.max_megapixels),
    )


def save_model(path: Path, model: OpenedModel, network: nn.Module, card: Card | None) -> None:
    """Write a network as `model` was given: a classifier file with this card, or a state_dict.

    Raises:
        UsageError: the state_dict holds something else than tensors, which safetensors cannot store.
        StorageError: no space left or no permission; nothing unfinished is left behind.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if card is not None:
        assert isinstance(network, TableNetwork)
        save_classifier(path, network, describe(network, card))
        return
    state = network.state_dict()
    if path.suffix == ".safetensors":
        others = [name for name, value in state.items() if not isinstance(value, Tensor)]
        if others:
            raise UsageError(
                f"{others[0]} of {model.name} is not a tensor, which safetensors cannot store",
                "pass a name that ends in .pt",
            )
        write_atomic(path, safetensors.torch.save(_separate(state)))
        return
    buffer = io.BytesIO()
    torch.save(_separate(state), buffer)
    write_atomic(path, buffer.getbuffer())


def measured_on(card: Card, photos: Photos, metrics: Mapping[str, Any], chosen_by: Photos | None = None) -> Card:
    """The card after statistics were measured on these photos, with the metrics of that.

    They count as seen in training, and those by which the repairs were chosen as seen in validation.
    """
    seen = card.seen | SeenPhotos.of(_as_they_are(photos, "train"))
    if chosen_by is not None:
        seen = seen | SeenPhotos.of(_as_they_are(chosen_by, "val"))
    return replace(card, seen=seen, metrics=dict(metrics))


def _as_they_are(photos: Photos, split: Literal["train", "val"]) -> Photos:
    """The photos with the SHA-256 of what their files hold now."""
    return Photos.of([Photo(photo.path, photo.label, split, file_sha256(photo.path)) for photo in photos])


def _separate(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with tensors on the CPU that share no memory."""
    return {
        name: value.detach().cpu().clone().contiguous() if isinstance(value, Tensor) else value
        for name, value in state.items()
    }
