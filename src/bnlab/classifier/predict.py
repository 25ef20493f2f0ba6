"""Classifiers that answer, alone or together: which class does a photo show, and with what probability?"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from bnlab.classifier.file import Card, load_network
from bnlab.data.cache import Cache
from bnlab.data.loader import preprocessed_batches
from bnlab.data.photo_file import MemoryPhoto, PhotoReader
from bnlab.data.photo_input import PhotoInput, photos_of
from bnlab.data.preprocess import Crops, Pixels, images_per_photo, normalise
from bnlab.errors import ClassifierError, PhotoError, UsageError, printable
from bnlab.machine import choose_device, memory_errors
from bnlab.nets.build import move_network
from bnlab.nets.network import TableNetwork
from bnlab.norm import fold
from bnlab.progress import NullProgress, Progress
from bnlab.recipe import MAX_MEGAPIXELS

Probabilities = NDArray[np.float32]
_WORTH_FOLDING = 100  # images: folding takes as long as a few images do, and saves about a tenth of the time after


@dataclass(frozen=True, slots=True)
class Candidate:
    """A class and its probability, in 0..1."""

    label: str
    probability: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one photo; for a photo that cannot be used only the reason."""

    path: str
    """as it was given; "photo N", counted from 1, for a photo that is not given as a path"""
    label: str | None
    """the most probable class; None if the photo cannot be used"""
    probability: float | None
    """of that class, in 0..1"""
    top: tuple[Candidate, ...]
    """the most probable classes, best first"""
    error: str | None = None
    """why the photo cannot be used"""


class Classifier:
    """A trained network with all that inference needs.

    >>> classifier = Classifier.load("runs/train/best.safetensors")
    >>> classifier.predict(["tulip.jpg"])[0].label
    'tulip'
    """

    def __init__(self, network: TableNetwork, card: Card, device: str = "cpu") -> None:
        self.network = network
        self.card = card
        self.device = device

    @classmethod
    def load(cls, path: str | PathLike[str], device: str = "auto") -> "Classifier":
        """Read a classifier file and move its network to a device ("auto", "cpu", "cuda" or "mps").

        Raises:
            ClassifierError: the file is missing, truncated, a pickle or of another format, or does not fit its network.
            UsageError: there is no such device.
        """
        network, card = load_network(Path(path))
        chosen = choose_device(device)
        return cls(move_network(network, chosen), card, chosen)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the probabilities' columns."""
        return self.card.classes

    def predict(
        self,
        photos: PhotoInput | Iterable[PhotoInput],
        *,
        top: int = 5,
        batch_size: int = 32,
        max_megapixels: float = MAX_MEGAPIXELS,
        progress: Progress | None = None,
    ) -> list[Prediction]:
        """A list with one prediction for each photo, in the order given, with the `top` most probable classes.

        A photo that cannot be used raises nothing: the `error` of its prediction gives the reason. So does one of more
        than `max_megapixels` million pixels (0: any is read).

        `photos` are one photo, or an iterable of photos, which may differ in kind:

        - a path;
        - the bytes of a file, or a file that is open in binary mode, from its position on; it stays open;
        - a PIL image of any mode. Its EXIF orientation is honoured, and it is not changed;
        - a uint8 array or tensor of height x width x 3 (RGB), x 4 (with opacity), x 1 or without channels (grey), or
          one of four dimensions with several photos. A tensor with its channels first, as torchvision has them, is
          refused.

        Raises:
            UsageError: something in `photos` is not a photo, or a number is below 1.
            ClassifierError: the weights are broken, so that the probabilities are not finite.
        """
        if top < 1 or batch_size < 1:
            raise UsageError(f"top {top} with batch_size {batch_size} is not valid", "both must be at least 1")
        reader = PhotoReader(max_megapixels=max_megapixels)
        predictions = []
        for some in photos_of(photos):
            (probabilities,), errors = classify([self], some, batch_size=batch_size, progress=progress, reader=reader)
            if not np.isfinite(probabilities[[error is None for error in errors]]).all():
                raise ClassifierError("the classifier's probabilities are not finite", "train it again")
            for photo, row, error in zip(some, probabilities, errors, strict=True):
                name = photo.name if isinstance(photo, MemoryPhoto) else photo
                if error:
                    predictions.append(Prediction(name, None, None, (), error.reason))
                else:
                    best = np.argsort(-row, kind="stable")[:top]
                    candidates = tuple(Candidate(self.classes[i], float(row[i])) for i in best)
                    predictions.append(Prediction(name, candidates[0].label, candidates[0].probability, candidates))
        reader.report(progress or NullProgress())
        return predictions

    @torch.inference_mode()
    def probabilities(self, pixels: Pixels, *, flip_tta: bool | None = None) -> Probabilities:
        """Softmax of the logits: uint8 N x size x size x 3 (from `preprocess`) to float32 N x classes.

        With `flip_tta` (default: as the card has it), the mean over each image and its mirror image.
        """
        flip_tta = self.card.preprocessing.flip_tta if flip_tta is None else flip_tta
        network = self.network
        training = network.training
        network.eval()
        try:
            images = normalise(torch.from_numpy(pixels).to(self.device), self.card.preprocessing)  # N x 3 x H x W
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
                answers = network(images).float().softmax(1)  # N x classes
                if flip_tta:
                    answers = (answers + network(images.flip(3)).float().softmax(1)) / 2
            return cast(Probabilities, answers.cpu().numpy())
        finally:
            network.train(training)


class Ensemble:
    """Classifiers that answer as one: their probabilities are averaged (Ioffe & Szegedy 2015, sec. 4.2.3).

    They have the same classes, in any order; each takes a photo at its own size, with its own preprocessing.

    >>> ensemble = Ensemble([Classifier.load("a.safetensors"), Classifier.load("b.safetensors")])
    >>> each, errors = classify(ensemble.members, ["tulip.jpg"], crops=144)
    >>> probabilities = mean_of(ensemble.in_order(each))
    """

    def __init__(self, members: Sequence[Classifier], names: Sequence[str] = ()) -> None:
        """`names` is what results and messages call the members (default: classifier 1, classifier 2, ...).

        Raises:
            UsageError: there are no members, or not as many names.
            ClassifierError: a member has a class that another has not.
        """
        self.members = tuple(members)
        self.names = tuple(names) or tuple(f"classifier {i}" for i in range(1, len(members) + 1))
        if not self.members or len(self.names) != len(self.members):
            raise UsageError(
                f"an ensemble of {len(self.members)} classifiers with {len(self.names)} names is not valid",
                "pass at least one classifier, and a name for each",
            )
        first = self.names[0]
        for name, member in zip(self.names, self.members, strict=True):
            odd = set(self.classes) ^ set(member.classes)
            for label in (*self.classes, *member.classes):
                if label in odd:
                    has, lacks = (first, name) if label in self.classes else (name, first)
                    raise ClassifierError(
                        f"{printable(has)} has the class '{printable(label)}' and {printable(lacks)} has not",
                        "use classifiers of the same classes",
                    )

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the first member's order, which is the ensemble's."""
        return self.members[0].classes

    def in_order(self, each: Sequence[Probabilities]) -> list[Probabilities]:
        """The members' probabilities with the columns in the ensemble's order of classes."""
        columns = [{label: i for i, label in enumerate(member.classes)} for member in self.members]
        return [
            answers.take([column[label] for label in self.classes], axis=1)
            for column, answers in zip(columns, each, strict=True)
        ]


def classify(
    classifiers: Sequence[Classifier],
    photos: Sequence[str | MemoryPhoto],
    *,
    batch_size: int = 32,
    workers: int = -1,
    progress: Progress | None = None,
    cache: Cache | None = None,
    crops: Crops = 1,
    reader: PhotoReader | None = None,
) -> tuple[list[Probabilities], list[PhotoError | None]]:
    """Each classifier's probabilities for photos, len(photos) x its classes, and each photo's error or None.

    The row of a photo with an error is NaN. A photo is read once for all classifiers that take the same pixels of it.
    `cache` is for these photos, this preprocessing and these crops alone. With 10 or 144 `crops` the probabilities are
    the mean over each photo's crops and their mirror images, whatever the card has for `flip_tta`. `reader`
    opens the photos, and gathers what its `report` tells of them.

    Raises:
        UsageError: an unknown number of crops, or a cache with classifiers that take different pixels.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, classifier in enumerate(classifiers):
        preprocessing = classifier.card.preprocessing
        of_one_crop = (preprocessing.resize, preprocessing.crop_fraction) if crops == 1 else ()
        settings = (preprocessing.size, preprocessing.interpolation, preprocessing.pixel_range, *of_one_crop)
        alike.setdefault(settings, []).append(i)
    if cache and len(alike) > 1:
        raise UsageError(
            f"a cache holds the pixels of one preprocessing, and these classifiers have {len(alike)}",
            "leave the cache out",
        )
    # For this call alone: tensors' version counters miss writes through .data, and show neither modes nor hooks.
    if len(photos) * crops >= _WORTH_FOLDING:
        classifiers = [Classifier(cast(TableNetwork, fold(c.network).model), c.card, c.device) for c in classifiers]
    answers: list[Probabilities] = [np.full((len(photos), len(c.classes)), np.nan, np.float32) for c in classifiers]
    errors: list[PhotoError | None] = [None] * len(photos)
    for indices in alike.values():
        preprocessing, first = classifiers[indices[0]].card.preprocessing, 0
        batches = preprocessed_batches(
            photos,
            preprocessing,
            batch_size=batch_size,
            workers=workers,
            cache=cache,
            crops=crops,
            reader=reader,
        )
        task_of_all = (progress or NullProgress()).task("classifying", len(photos), "photos")
        with memory_errors(batch_size, preprocessing.size), task_of_all as task:
            for pixels, errors_of_batch in batches:
                for i, error in enumerate(errors_of_batch, first):
                    errors[i] = errors[i] or error
                usable = [i for i, error in enumerate(errors_of_batch, first) if error is None]
                if usable:
                    for number in indices:
                        answers[number][usable] = _mean_over_crops(classifiers[number], pixels, crops, batch_size)
                first += len(errors_of_batch)
                task.advance(len(errors_of_batch))
    return answers, errors


def mean_of(each: Sequence[Probabilities]) -> Probabilities:
    """The mean of N x classes probabilities, summed in float64; of one, itself."""
    if len(each) == 1:
        return each[0]
    return np.asarray(np.mean(each, axis=0, dtype=np.float64), dtype=np.float32)


def _mean_over_crops(classifier: Classifier, pixels: Pixels, crops: Crops, batch_size: int) -> Probabilities:
    """M x classes for M photos from the pixels of their M*K crops, `batch_size` crops at a time."""
    if crops == 1:
        return classifier.probabilities(pixels)
    parts = np.array_split(pixels, -(-len(pixels) // batch_size))  # each b x size x size x 3
    answers = np.concatenate([classifier.probabilities(part, flip_tta=True) for part in parts])  # M*K x classes
    by_photo = answers.reshape(-1, images_per_photo(crops), answers.shape[1])  # M x K x classes
    return np.asarray(by_photo.mean(1, dtype=np.float64), dtype=np.float32)
