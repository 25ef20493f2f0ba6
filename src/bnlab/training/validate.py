"""Validates a network on val, by population statistics that are measured anew for its weights."""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count

import torch
from torch import Tensor

from bnlab.classifier.evaluate import Evaluation, evaluate
from bnlab.classifier.predict import Classifier
from bnlab.data.cache import Cache
from bnlab.data.loader import preprocessed_batches
from bnlab.data.photos import Photo
from bnlab.data.preprocess import Preprocessing, normalise
from bnlab.errors import DivergedError, PhotoError, UsageError
from bnlab.health.findings import StatisticsCost
from bnlab.machine import release_memory
from bnlab.nets.network import TableNetwork
from bnlab.norm import NotFiniteError, Recalibration, recalibrate
from bnlab.progress import NullProgress, Progress
from bnlab.training.build import TrainingContext, card_of


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """What a validation found. The network of the Validator keeps the statistics it was found with."""

    evaluation: Evaluation
    """by the recalibrated statistics, which inference will have"""
    running: Evaluation | None = None
    """by the running statistics; None if nothing was recalibrated, or they gave results that are not finite"""
    recalibration: Recalibration | None = None
    """how far the running statistics of each layer were from the recalibrated ones"""
    seconds: float
    """time that the recalibration took"""

    @property
    def running_top1(self) -> float | None:
        return self.running.top1 if self.running else None

    @property
    def statistics_cost(self) -> StatisticsCost | None:
        """The accuracy that the running statistics cost, compared with the recalibrated ones."""
        if self.running is None:
            return None
        correct = [evaluation.predicted == evaluation.targets for evaluation in (self.running, self.evaluation)]
        return StatisticsCost.measure(*correct)


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
        """Copy the network; `photos` are validated on, and kept in `val_cache`.

        `sample_cache` keeps the training photos to recalibrate on. `evaluate_running` evaluates by the running
        statistics, too.
        """
        recipe, loader = context.recipe, context.loader
        recalibrates = keeps_statistics(context.network) and not recipe.freeze_bn
        self.sample = [loader.paths[i] for i in loader.sample(recipe.recalibration_images if recalibrates else 0)]
        self.classifier = Classifier(
            copy.deepcopy(context.network).requires_grad_(False), card_of(context), context.device
        )
        self.batch_size = -(-len(loader.paths) // loader.batches)
        self.photos, self.workers, self.evaluate_running = photos, loader.workers, evaluate_running
        self.sample_cache, self.val_cache = sample_cache, val_cache

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
        if self.sample:
            if self.evaluate_running:
                with suppress(DivergedError):  # the recalibrated statistics may still be finite
                    running = self._evaluate(NullProgress())
            began = time.monotonic()
            recalibration = recalibrate_on(
                self.network,
                self.sample,
                self.classifier.card.preprocessing,
                batch_size=self.batch_size,
                device=self.classifier.device,
                workers=self.workers,
                cache=self.sample_cache,
            )
            seconds = time.monotonic() - began
        return ValidationResult(
            evaluation=self._evaluate(progress), running=running, recalibration=recalibration, seconds=seconds
        )

    def _evaluate(self, progress: Progress) -> Evaluation:
        evaluation = evaluate(
            self.classifier, self.photos, "val", workers=self.workers, progress=progress, cache=self.val_cache
        )
        for refusal in evaluation.refused:  # it could be read when the run began, and epochs must stay comparable
            raise PhotoError(refusal.path, refusal.reason)
        return evaluation


def keeps_statistics(network: TableNetwork) -> bool:
    """Whether a layer of the network keeps running statistics."""
    return any(getattr(layer, "running_mean", None) is not None for layer in network.modules())


def recalibrate_on(
    network: TableNetwork,
    paths: Sequence[str],
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    device: str,
    workers: int = 0,
    cache: Cache | None = None,
) -> Recalibration:
    """Replace the running statistics of a network by population statistics measured on photos as inference sees them.

    Raises:
        DivergedError: the statistics are not finite.
        PhotoError: a photo can no longer be read.
        UsageError: the photos are too few to measure statistics on.
    """
    batches = calibration_batches(
        paths, preprocessing, batch_size=batch_size, device=device, workers=workers, cache=cache
    )
    try:
        return recalibrate(network, batches)
    except NotFiniteError as error:
        raise DivergedError(f"recalibration met {error}", "train with a lower --learning-rate") from None
    except ValueError as error:
        raise UsageError(f"recalibration on {len(paths)} photos: {error}", "raise recalibration_images") from None


def calibration_batches(
    paths: Sequence[str],
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    device: str,
    workers: int = 0,
    cache: Cache | None = None,
) -> Iterator[Tensor]:
    """Photos as inference sees them, N x 3 x H x W, to measure statistics on. `cache` holds these photos only.

    N is `batch_size`, or the nearest size that leaves no single photo over: behind fully connected layers, a batch of
    one has no variance.

    Raises:
        PhotoError: a photo can no longer be read.
    """
    sizes = chain(range(batch_size, 1, -1), count(batch_size + 1))
    size = next(size for size in sizes if len(paths) == 1 or len(paths) % size != 1)
    for pixels, errors in preprocessed_batches(paths, preprocessing, batch_size=size, workers=workers, cache=cache):
        for error in filter(None, errors):
            raise error
        yield normalise(torch.from_numpy(pixels).to(device), preprocessing)
