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
from bnlab.data.loader import prepared_batches
from bnlab.data.pixels import Pixels, normalise
from bnlab.errors import ClassifierError, PhotoError, UsageError, printable
from bnlab.machine import choose_device, memory_errors
from bnlab.nets.build import to_device
from bnlab.nets.network import TableNetwork
from bnlab.norm import fold
from bnlab.progress import Progress, Silent

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
        return cls(to_device(network, chosen), card, chosen)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the probabilities' columns."""
        return self.card.classes

    def refresh(self) -> None:
        """Take in that the network's weights or statistics were changed."""
        self._folded = None

    @torch.inference_mode()
    def probabilities(self, pixels: Pixels) -> Probabilities:
        """Softmax of the logits: uint8 N x size x size x 3 (from `prepare`) to float32 N x classes.

        Where the card says `mirror`, the mean of that for the photos and that for their mirror images.
        """
        network = self._folded or self.network
        training = network.training
        network.eval()
        try:
            images = normalise(torch.from_numpy(pixels).to(self.device), self.card.view)  # N x 3 x H x W
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
                answers = network(images).float().softmax(1)  # N x classes
                if self.card.view.mirror:
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
    ) -> tuple[Probabilities, list[PhotoError | None]]:
        """Probabilities of photos by path, len(paths) x classes, and each photo's error or None.

        The row of a photo with an error is NaN. `cache` is of these paths and this view alone.
        """
        rows: list[Probabilities] = []
        errors: list[PhotoError | None] = []
        if self._folded is None and len(paths) >= _WORTH_FOLDING:
            self._folded = fold(self.network).model
        task_of_all = (progress or Silent()).task("classifying", len(paths), "photos")
        with memory_errors(batch_size, self.card.view.size), task_of_all as task:
            for pixels, errors_of_batch in prepared_batches(
                paths, self.card.view, batch_size=batch_size, workers=workers, cache=cache
            ):
                found = iter(self.probabilities(pixels)) if len(pixels) else iter(())
                unknown = np.full(len(self.classes), np.nan, dtype=np.float32)
                rows += [unknown if error else next(found) for error in errors_of_batch]
                errors += errors_of_batch
                task.advance(len(errors_of_batch))
        return np.stack(rows) if rows else np.empty((0, len(self.classes)), dtype=np.float32), errors

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
