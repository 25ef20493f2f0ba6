"""Judging a network on val: by population statistics measured for its weights, and by the running ones beside."""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count

import torch
from torch import Tensor

from bnlab.classifier.card import Card
from bnlab.classifier.evaluate import Evaluation, evaluate
from bnlab.classifier.predict import Classifier
from bnlab.data.cache import Cache
from bnlab.data.loader import TrainingLoader, preprocessed_batches
from bnlab.data.photos import Photo
from bnlab.data.preprocess import Preprocessing, normalise
from bnlab.errors import DivergedError, PhotoError, UsageError
from bnlab.health.findings import StatisticsCost
from bnlab.machine import release_memory
from bnlab.nets.network import TableNetwork
from bnlab.norm import recalibrate
from bnlab.norm.recalibrate import Recalibration
from bnlab.progress import NullProgress, Progress


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """What a judgement found; the judge's network is as it was judged, to be kept."""

    evaluation: Evaluation
    """by the statistics that inference will have"""
    running: Evaluation | None = None
    """by the running statistics of training, on the same photos; None if not measured"""
    recalibration: Recalibration | None = None
    """what measuring the population statistics gave; None if inference uses the running statistics"""
    seconds: float
    """time that recalibration took"""

    @property
    def running_top1(self) -> float | None:
        return self.running.top1 if self.running else None

    @property
    def statistics_cost(self) -> StatisticsCost | None:
        """What the running statistics cost in accuracy, compared with the population statistics."""
        if self.running is None:
            return None
        correct = [evaluation.predicted == evaluation.targets for evaluation in (self.running, self.evaluation)]
        return StatisticsCost.measure(*correct)


class Validator:
    """Judges copies: training goes on with its own statistics, whether or when it was judged."""

    def __init__(
        self,
        network: TableNetwork,
        card: Card,
        device: str,
        *,
        loader: TrainingLoader,
        val: Sequence[Photo],
        recalibrate: int,
        caches: tuple[Cache, Cache],
        beside: bool = True,
    ) -> None:
        """`recalibrate`: photos of train to measure on; `caches`: for these, and for val; `beside`: see what the
        running statistics would give, too."""
        self.beside = beside
        self.classifier = Classifier(copy.deepcopy(network).requires_grad_(False), card, device)
        self.sample = [loader.paths[i] for i in loader.sample(recalibrate)]
        self.batch_size = -(-len(loader.paths) // loader.batches)
        self.val, self.workers = val, loader.workers
        self.sample_cache, self.val_cache = caches

    @property
    def network(self) -> TableNetwork:
        """The network that was judged last."""
        return self.classifier.network

    def __call__(self, network: TableNetwork, progress: Progress) -> ValidationResult:
        """Judge a network as it is now.

        Raises:
            DivergedError: its outputs or statistics are not finite.
            PhotoError: a photo can no longer be read.
        """
        release_memory()  # what training needs for a step, which is not needed now
        self.network.load_state_dict(network.state_dict())
        running, recalibration, seconds = None, None, 0.0
        if self.sample:
            with suppress(DivergedError):  # of statistics it is not judged by
                running = self._evaluate(NullProgress()) if self.beside else None
            began = time.monotonic()
            batches = calibration_batches(
                self.sample,
                self.classifier.card.preprocessing,
                batch_size=self.batch_size,
                device=self.classifier.device,
                workers=self.workers,
                cache=self.sample_cache,
            )
            try:
                recalibration = recalibrate(self.network, batches)
            except ValueError as error:
                if "not finite" in str(error):
                    raise DivergedError(f"recalibration met {error}", "train with a lower --learning-rate") from None
                raise UsageError(f"recalibration on {len(self.sample)} photos: {error}", "raise recalibrate") from None
            seconds = time.monotonic() - began
        return ValidationResult(
            evaluation=self._evaluate(progress), running=running, recalibration=recalibration, seconds=seconds
        )

    def _evaluate(self, progress: Progress) -> Evaluation:
        self.classifier.refresh()
        evaluation = evaluate(
            self.classifier, self.val, "val", workers=self.workers, progress=progress, cache=self.val_cache
        )
        for refusal in evaluation.refused:  # it was fine when the run began, and epochs must be judged alike
            raise PhotoError(refusal.path, refusal.reason)
        return evaluation


def calibration_batches(
    paths: Sequence[str],
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    device: str,
    workers: int = 0,
    cache: Cache | None = None,
) -> Iterator[Tensor]:
    """Photos as inference sees them, N x 3 x H x W, to measure statistics on. `cache` is of these paths and this view.

    Batches are of `batch_size` photos, or of nearly as many where else a single one would be left over: behind fully
    connected layers that has no variance.

    Raises:
        PhotoError: a photo can no longer be read.
    """
    sizes = chain(range(batch_size, 1, -1), count(batch_size + 1))
    size = next(size for size in sizes if len(paths) == 1 or len(paths) % size != 1)
    for pixels, errors in preprocessed_batches(paths, preprocessing, batch_size=size, workers=workers, cache=cache):
        for error in filter(None, errors):
            raise error
        yield normalise(torch.from_numpy(pixels).to(device), preprocessing)
