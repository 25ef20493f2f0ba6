"""Validates a network on val, by population statistics that are measured anew for its weights."""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count

import numpy as np
import torch
from torch import Tensor

from bnlab.classifier.evaluate import Evaluation, evaluate
from bnlab.classifier.predict import Classifier
from bnlab.data.cache import Cache
from bnlab.data.loader import preprocessed_batches
from bnlab.data.photos import Photo
from bnlab.data.preprocess import normalise
from bnlab.errors import DivergedError, PhotoError, UsageError
from bnlab.health.evidence import Scores
from bnlab.machine import release_memory
from bnlab.nets.network import TableNetwork
from bnlab.norm import NotFiniteError, Recalibration, TooFewValuesError, recalibrate
from bnlab.progress import NullProgress, Progress
from bnlab.training.build import TrainingContext, card_of


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """What a validation found. The network of the Validator keeps the statistics it was found with."""

    evaluation: Evaluation  # by the recalibrated statistics, which inference will have
    running: Evaluation | None = None
    """by the running statistics; None if nothing was recalibrated, or they gave results that are not finite"""
    recalibration: Recalibration | None = None
    """how far the running statistics of each layer were from the recalibrated ones"""
    seconds: float  # time that the recalibration took

    @property
    def scores(self) -> Scores | None:
        """Whether each photo is classified correctly by the running statistics and by the recalibrated ones."""
        if self.running is None:
            return None
        running, population = (
            (evaluation.predicted == evaluation.targets).astype(np.float64)
            for evaluation in (self.running, self.evaluation)
        )
        return Scores(running=running, population=population)


class Validator:
    """Validates a copy of the network, so that validation never changes the statistics that training uses."""

    def __init__(
        self,
        context: TrainingContext,
        photos: Sequence[Photo],
        *,
        sample_cache: Cache,
        val_cache: Cache,
        evaluate_running: bool = True,
    ) -> None:
        """Copy the network. `photos` are validated on, and `evaluate_running` evaluates them a second time.

        `val_cache` is for these photos, `sample_cache` for the training photos to recalibrate on.
        """
        recalibrates = keeps_statistics(context.network) and not context.recipe.freeze_bn
        self.images = context.recipe.recalibration_images if recalibrates else 0
        self.context, self.photos, self.evaluate_running = context, photos, evaluate_running
        self.sample_cache, self.val_cache = sample_cache, val_cache
        network = copy.deepcopy(context.network).requires_grad_(False)
        self.classifier = Classifier(network, card_of(context))

    @property
    def network(self) -> TableNetwork:
        """The copy, with the weights and statistics of the latest validation."""
        return self.classifier.network

    def __call__(self, network: TableNetwork, progress: Progress) -> ValidationResult:
        """Validate the network as it is now.

        Raises:
            DivergedError: its outputs or statistics are not finite.
            PhotoError: a photo can no longer be read.
        """
        release_memory()  # the memory of a training step, which validation does not need
        self.network.load_state_dict(network.state_dict())
        running, recalibration, seconds = None, None, 0.0
        if self.images:
            if self.evaluate_running:
                with suppress(DivergedError):  # the recalibrated statistics may still be finite
                    running = self._evaluate(NullProgress())
            began = time.monotonic()
            loader = self.context.loader
            batch_size = -(-len(loader.paths) // (loader.batches * self.context.recipe.accumulate))
            recalibration = recalibrate_network(
                self.network, calibration_batches(self.context, self.images, batch_size, self.sample_cache)
            )
            seconds = time.monotonic() - began
        return ValidationResult(
            evaluation=self._evaluate(progress), running=running, recalibration=recalibration, seconds=seconds
        )

    def _evaluate(self, progress: Progress) -> Evaluation:
        workers = self.context.loader.workers
        evaluation = evaluate(
            self.classifier,
            self.photos,
            "val",
            workers=workers,
            progress=progress,
            cache=self.val_cache,
            reader=self.context.loader.reader,
        )
        for refusal in evaluation.refused:  # it could be read when the run began, and epochs must stay comparable
            raise PhotoError(refusal.path, refusal.reason)
        return evaluation


def keeps_statistics(network: TableNetwork) -> bool:
    """Whether a layer of the network keeps running statistics."""
    return any(getattr(layer, "running_mean", None) is not None for layer in network.modules())


def recalibrate_network(network: TableNetwork, batches: Iterator[Tensor]) -> Recalibration:
    """Replace the running statistics by population statistics measured on the batches, N x 3 x H x W.

    Raises:
        DivergedError: the statistics are not finite.
        UsageError: the photos are too few to measure statistics on.
    """
    try:
        return recalibrate(network, batches)
    except NotFiniteError as error:
        problem = f"values that are not finite reach {error.layer} in recalibration"
        raise DivergedError(problem, "train with a lower learning_rate") from None
    except TooFewValuesError as error:
        raise UsageError(f"recalibration: {error}", "raise recalibration_images") from None


def calibration_batches(
    context: TrainingContext, images: int, batch_size: int, cache: Cache | None = None
) -> Iterator[Tensor]:
    """A sample of the training photos as inference sees them, N x 3 x H x W, to measure statistics on.

    `images` are as many as the sample has, at most. N is `batch_size`, or the nearest size that leaves no single photo
    over: behind fully connected layers, a batch of one has no variance. `cache` is for this sample alone.

    Raises:
        PhotoError: a photo can no longer be read.
    """
    loader, preprocessing = context.loader, context.preprocessing
    paths = [loader.paths[i] for i in loader.sample(images)]
    sizes = chain(range(batch_size, 1, -1), count(batch_size + 1))
    size = next(size for size in sizes if len(paths) == 1 or len(paths) % size != 1)
    for pixels, errors in preprocessed_batches(
        paths, preprocessing, batch_size=size, workers=loader.workers, cache=cache, reader=loader.reader
    ):
        for error in filter(None, errors):
            raise error
        yield normalise(torch.from_numpy(pixels).to(context.device), preprocessing)
