"""Classifiers that answer: which class does a photo show, and with what probability?

Threads may use one classifier at the same time. So a prediction changes nothing: neither modes nor weights, and it
keeps nothing that follows from the weights, so that it always answers by the present ones. (Batch normalisation is not
folded for the same reason: torch.fx, by which `norm.fold` finds its layers, makes modules fail in all other threads.)
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bnlab.classifier.file import Card, check_new_file, describe, file_of, load_network, save_classifier
from bnlab.data.cache import Cache
from bnlab.data.loader import preprocessed_batches
from bnlab.data.photo_file import MemoryPhoto, PhotoReader
from bnlab.data.photo_input import PhotoInput, check_batch, photos_of
from bnlab.data.preprocess import Crops, Pixels, images_per_photo, normalise, preprocess
from bnlab.errors import ClassifierError, PhotoError, UsageError, plural, printable
from bnlab.files import storage_errors
from bnlab.machine import choose_device, exact_kernels, memory_errors
from bnlab.nets.build import move_network
from bnlab.nets.network import TableNetwork
from bnlab.progress import LoggedProgress, NullProgress, Progress
from bnlab.recipe import MAX_MEGAPIXELS

Probabilities = NDArray[np.float32]
AnyPath = str | PathLike[str]


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

    >>> from bnlab import Classifier
    >>> classifier = Classifier.load("runs/train/best.safetensors")
    >>> classifier.classes
    ('daisy', 'rose', 'tulip')
    >>> best = classifier.predict(["tulip.jpg"])[0].top[0]
    >>> best.label in classifier.classes, best.probability > 1 / 3
    (True, True)
    >>> import numpy as np
    >>> classifier.predict_proba(np.zeros((2, 480, 640, 3), np.uint8)).shape
    (2, 3)
    >>> classifier.save("flowers.safetensors")
    """

    def __init__(self, network: TableNetwork, card: Card, *, path: AnyPath | None = None) -> None:
        self.network = network
        self.card = card
        self.path = None if path is None else Path(path)

    @classmethod
    def load(cls, path: AnyPath, device: str = "auto") -> "Classifier":
        """Read a classifier file.

        Args:
            path: The file, or the folder of a run, whose best.safetensors is read.
            device: Device to move the network to (auto: the first of cuda, mps and cpu that is there).

        Raises:
            ClassifierError: the file is missing, truncated, a pickle or of another format, or does not fit its network.
            UsageError: there is no such device.
        """
        path = file_of(path)
        network, card = load_network(path)
        return cls(move_network(network, choose_device(device)), card, path=path)

    def save(self, path: AnyPath) -> None:
        """Write a classifier file with the present weights; loading it gives the same float32 weights, bit for bit.

        The metrics and the recipe in its card are those of the training, whatever was changed since.

        Args:
            path: New file; its name has to end in .safetensors.

        Raises:
            UsageError: the file exists or has another suffix, or the network is not one that a card can describe.
            StorageError: the disk is full or cannot be written to; nothing unfinished is left behind.
        """
        path = Path(path)
        check_new_file(path)
        card = describe(self.network, self.card)
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        save_classifier(path, self.network, card)

    def __repr__(self) -> str:
        network, size = getattr(self.network, "name", type(self.network).__name__), self.card.preprocessing.size
        shown = f"{network}, {plural(len(self.classes), 'class')}, {size} px, on {self.device}"
        return f"<Classifier {shown}{f', from {printable(self.path)}' if self.path else ''}>"

    @property
    def device(self) -> str:
        """Where the network is now."""
        return next((str(tensor.device) for tensor in self.network.parameters()), "cpu")

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
        return predict_photos(
            [self],
            lambda each: each[0],
            photos,
            top=top,
            batch_size=batch_size,
            max_megapixels=max_megapixels,
            progress=progress,
        )

    def predict_proba(self, batch: "NDArray[np.uint8] | torch.Tensor", *, batch_size: int = 32) -> Probabilities:
        """The probabilities of the classes for photos that are in memory.

        Each gets the preprocessing that `predict` gives to a photo with these pixels.

        Args:
            batch: uint8 array or tensor, N x H x W x 3 (RGB), of any N, H and W.
            batch_size: Number of images that go through the network at a time.

        Returns:
            float32 array, N x classes; its columns are in the order of `classes`.

        Raises:
            UsageError: the batch has another shape or type, or `batch_size` is below 1.
            ClassifierError: the weights are broken, so that the probabilities are not finite.
        """
        if batch_size < 1:
            raise UsageError(f"batch_size {batch_size} is not valid", "it must be at least 1")
        photos = check_batch(batch)  # N x H x W x 3
        answers = [np.empty((0, len(self.classes)), np.float32)]
        for start in range(0, len(photos), batch_size):
            images = [Image.fromarray(photo) for photo in photos[start : start + batch_size]]
            with memory_errors(batch_size, self.card.preprocessing.size):
                answers.append(self.probabilities(np.stack([preprocess(i, self.card.preprocessing) for i in images])))
        return check_finite(np.concatenate(answers))  # N x classes

    def probabilities(self, pixels: Pixels, *, flip_tta: bool | None = None) -> Probabilities:
        """Softmax of the logits: uint8 N x size x size x 3 (from `preprocess`) to float32 N x classes.

        With `flip_tta` (default: as the card has it), the mean over each image and its mirror image.
        """
        flip_tta = self.card.preprocessing.flip_tta if flip_tta is None else flip_tta
        network = _in_evaluation(self.network)
        images = normalise(torch.from_numpy(pixels).to(self.device), self.card.preprocessing)  # N x 3 x H x W
        with exact_kernels(), torch.inference_mode():
            answers = network(images).float().softmax(1)  # N x classes
            if flip_tta:
                answers = (answers + network(images.flip(3)).float().softmax(1)) / 2
        return cast(Probabilities, answers.cpu().numpy())


def predict_photos(
    classifiers: Sequence[Classifier],
    combine: Callable[[list[Probabilities]], Probabilities],
    photos: PhotoInput | Iterable[PhotoInput],
    *,
    top: int,
    batch_size: int,
    max_megapixels: float,
    progress: Progress | None,
) -> list[Prediction]:
    """A prediction for each photo, as `Classifier.predict` describes it.

    `combine` makes one answer, N x classes in the order of the first classifier, of those of all classifiers.
    """
    if top < 1 or batch_size < 1:
        raise UsageError(f"top {top} with batch_size {batch_size} is not valid", "both must be at least 1")
    classes, reader = classifiers[0].classes, PhotoReader(max_megapixels=max_megapixels)
    progress = progress if isinstance(progress, LoggedProgress) else LoggedProgress(progress)
    predictions = []
    for some in photos_of(photos):
        each, errors = classify(classifiers, some, batch_size=batch_size, progress=progress, reader=reader)
        probabilities = combine(each)
        check_finite(probabilities[[error is None for error in errors]])
        for photo, row, error in zip(some, probabilities, errors, strict=True):
            name = photo.name if isinstance(photo, MemoryPhoto) else photo
            if error:
                predictions.append(Prediction(name, None, None, (), error.reason))
            else:
                best = np.argsort(-row, kind="stable")
                candidates = tuple(Candidate(classes[i], float(row[i])) for i in best[:top])
                predictions.append(Prediction(name, candidates[0].label, candidates[0].probability, candidates))
    reader.report(progress)
    return predictions


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
    the mean over the crops and their mirror images, whatever the card has for `flip_tta`. `reader` opens the photos.

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


def _mean_over_crops(classifier: Classifier, pixels: Pixels, crops: Crops, batch_size: int) -> Probabilities:
    """M x classes for M photos from the pixels of their M*K crops, `batch_size` crops at a time."""
    if crops == 1:
        return classifier.probabilities(pixels)
    parts = np.array_split(pixels, -(-len(pixels) // batch_size))  # each b x size x size x 3
    answers = np.concatenate([classifier.probabilities(part, flip_tta=True) for part in parts])  # M*K x classes
    by_photo = answers.reshape(-1, images_per_photo(crops), answers.shape[1])  # M x K x classes
    return np.asarray(by_photo.mean(1, dtype=np.float64), dtype=np.float32)


def check_finite(probabilities: Probabilities) -> Probabilities:
    if not np.isfinite(probabilities).all():
        raise ClassifierError("the classifier's probabilities are not finite", "train it again")
    return probabilities


def _in_evaluation(network: TableNetwork) -> TableNetwork:
    """The network, or, where a part of it is in training mode, a copy in evaluation mode with its tensors and hooks."""
    if not any(module.training for module in network.modules()):
        return network
    shared: list[object] = [*network.parameters(), *network.buffers()]
    for module in network.modules():
        shared += [hooks for name, hooks in vars(module).items() if name.endswith("_hooks")]
    return copy.deepcopy(network, {id(each): each for each in shared}).eval()
