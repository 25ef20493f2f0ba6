"""A classifier that answers: which class is this photo, and how sure is that?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bnlab.classifier.card import Card
from bnlab.classifier.file import load_network
from bnlab.data.cache import Cache
from bnlab.data.loader import preprocessed_batches
from bnlab.data.preprocess import Crops, Pixels, images_per_photo, normalise
from bnlab.errors import ClassifierError, PhotoError, UsageError, printable
from bnlab.machine import choose_device, memory_errors
from bnlab.nets.build import move_network
from bnlab.nets.network import TableNetwork
from bnlab.norm import fold
from bnlab.progress import NullProgress, Progress

Probabilities = NDArray[np.float32]
_WORTH_FOLDING = 100  # photos: folding BN away takes a fifth of a second, and saves about a tenth of the time after


@dataclass(frozen=True, slots=True)
class Candidate:
    """A class and its probability, in 0..1."""

    label: str
    probability: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a classifier says of one photo. Of one that cannot be used it says only the reason."""

    path: str
    """as it was given"""
    label: str | None
    """the most probable class; None where the photo cannot be used"""
    probability: float | None
    """of that class, in 0..1"""
    top: tuple[Candidate, ...]
    """the most probable classes, best first"""
    error: str | None = None
    """why the photo cannot be used, else None"""


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
        self._folded: nn.Module | None = None

    @classmethod
    def load(cls, path: str | PathLike[str], device: str = "auto") -> "Classifier":
        """Read a classifier file and put its network on a device ("auto", "cpu", "cuda" or "mps").

        Raises:
            ClassifierError: the file is not there, cut short, a pickle, of a newer format, or does not fit its network.
            UsageError: there is no such device.
        """
        network, card = load_network(Path(path))
        chosen = choose_device(device)
        return cls(move_network(network, chosen), card, chosen)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the probabilities' columns."""
        return self.card.classes

    def refresh(self) -> None:
        """Take in that the network's weights or statistics were changed."""
        self._folded = None

    @torch.inference_mode()
    def probabilities(self, pixels: Pixels, *, flip_tta: bool | None = None) -> Probabilities:
        """Softmax of the logits: uint8 N x size x size x 3 (from `preprocess`) to float32 N x classes.

        With `flip_tta`, the mean of the photos' probabilities and their mirror images'. The card says so unless given.
        """
        flip_tta = self.card.preprocessing.flip_tta if flip_tta is None else flip_tta
        network = self._folded or self.network
        training = network.training
        network.eval()
        try:
            images = normalise(torch.from_numpy(pixels).to(self.device), self.card.preprocessing)  # N x 3 x H x W
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
                answers = network(images).float().softmax(1)  # N x classes
                if flip_tta:
                    answers = (answers + network(images.flip(3)).float().softmax(1)) / 2
            probabilities: Probabilities = answers.cpu().numpy()
            return probabilities
        finally:
            network.train(training)

    def classify(
        self,
        paths: Sequence[str],
        *,
        batch_size: int = 32,
        workers: int = -1,
        progress: Progress | None = None,
        cache: Cache | None = None,
        crops: Crops = 1,
    ) -> tuple[Probabilities, list[PhotoError | None]]:
        """Probabilities of photos by path, len(paths) x classes, and each photo's error or None.

        The row of a photo with an error is NaN. `cache` is of these paths, this view and these crops alone. With 10 or
        144 `crops`, the mean of those of each (see `tta_crops`); they have their mirror images among them, whatever
        the card says of `flip_tta`.

        Raises:
            UsageError: the papers have no such number of crops.
        """
        (answers,), errors = classify_alike(
            [self], paths, batch_size=batch_size, workers=workers, progress=progress, cache=cache, crops=crops
        )
        return answers, errors

    def fold(self) -> None:
        """Fold batch normalisation away, for the answers from here on, until `refresh`."""
        if self._folded is None:
            self._folded = fold(self.network).model

    def predict(
        self,
        paths: Sequence[str | PathLike[str]],
        *,
        top: int = 5,
        batch_size: int = 32,
        progress: Progress | None = None,
    ) -> list[Prediction]:
        """One prediction for each photo, in the order given, with the `top` most probable classes.

        A photo that cannot be used gives a prediction whose `error` says why; it raises nothing.

        Raises:
            UsageError: `paths` is a single path, or a number is below 1.
            ClassifierError: its weights are broken: what it gives are no numbers.
        """
        if isinstance(paths, (str, PathLike)):
            raise UsageError(f"predict takes a list of paths, not one ({printable(paths)})", "put it in a list: [path]")
        if top < 1 or batch_size < 1:
            raise UsageError(f"top {top} with batch_size {batch_size} cannot be", "both are at least 1")
        names = [fspath(path) for path in paths]
        probabilities, errors = self.classify(names, batch_size=batch_size, progress=progress)
        usable = [error is None for error in errors]
        if not np.isfinite(probabilities[usable]).all():
            raise ClassifierError("the classifier's probabilities are no finite numbers", "train it again")
        return list(self._predictions(names, probabilities, errors, top))

    def _predictions(
        self, names: Sequence[str], probabilities: Probabilities, errors: Sequence[PhotoError | None], top: int
    ) -> Iterator[Prediction]:
        for name, row, error in zip(names, probabilities, errors, strict=True):
            if error:
                yield Prediction(name, None, None, (), error.reason)
            else:
                best = np.argsort(-row, kind="stable")[:top]
                candidates = tuple(Candidate(self.classes[i], float(row[i])) for i in best)
                yield Prediction(name, candidates[0].label, candidates[0].probability, candidates)


def classify_alike(
    classifiers: Sequence[Classifier],
    paths: Sequence[str],
    *,
    batch_size: int = 32,
    workers: int = -1,
    progress: Progress | None = None,
    cache: Cache | None = None,
    crops: Crops = 1,
) -> tuple[list[Probabilities], list[PhotoError | None]]:
    """As `Classifier.classify`, by several of as many classes whose views take the same squares: a photo is read once.

    Each one's probabilities, len(paths) x classes in its own order of classes, and each photo's error or None.
    """
    preprocessing = classifiers[0].card.preprocessing
    rows: list[list[Probabilities]] = [[] for _ in classifiers]
    errors: list[PhotoError | None] = []
    if len(paths) * crops >= _WORTH_FOLDING:
        for classifier in classifiers:
            classifier.fold()
    task_of_all = (progress or NullProgress()).task("classifying", len(paths), "photos")
    with memory_errors(batch_size, preprocessing.size), task_of_all as task:
        for pixels, errors_of_batch in preprocessed_batches(
            paths, preprocessing, batch_size=batch_size, workers=workers, cache=cache, crops=crops
        ):
            for classifier, its_rows in zip(classifiers, rows, strict=True):
                found = iter(_answers(classifier, pixels, crops, batch_size)) if len(pixels) else iter(())
                unknown = np.full(len(classifier.classes), np.nan, dtype=np.float32)
                its_rows += [unknown if error else next(found) for error in errors_of_batch]
            errors += errors_of_batch
            task.advance(len(errors_of_batch))
    shape = (len(paths), len(classifiers[0].classes))
    return [np.array(its_rows, dtype=np.float32).reshape(shape) for its_rows in rows], errors


def _answers(classifier: Classifier, pixels: Pixels, crops: Crops, batch_size: int) -> Probabilities:
    """M x classes of M photos by their M*K pictures, of which the network sees `batch_size` at a time."""
    if crops == 1:
        return classifier.probabilities(pixels)
    parts = np.array_split(pixels, -(-len(pixels) // batch_size))  # of b x size x size x 3
    answers = np.concatenate([classifier.probabilities(part, flip_tta=True) for part in parts])  # M*K x classes
    by_photo = answers.reshape(-1, images_per_photo(crops), answers.shape[1])  # M x K x classes
    mean: Probabilities = by_photo.mean(1, dtype=np.float64).astype(np.float32)
    return mean
