"""Trains a network for a study by the product's own loop, with a probe that measures while it is trained."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnlab.classifier.evaluate import Evaluation, evaluate
from bnlab.classifier.predict import Classifier
from bnlab.data.cache import Cache
from bnlab.data.dataset import Dataset, open_recorded_data
from bnlab.data.photos import Photos
from bnlab.errors import DivergedError
from bnlab.lab.measurements import JobContext
from bnlab.lab.records import Results, Row, Value
from bnlab.lab.replay import preserving_state, use_batch_statistics
from bnlab.nets.network import TableNetwork
from bnlab.norm.layers import BatchNorm
from bnlab.progress import NullProgress
from bnlab.recipe import Recipe
from bnlab.runs import Run
from bnlab.streams import Use, random_stream
from bnlab.training import loop
from bnlab.training.build import TrainingContext, build_context, cached_side, card_of, init_on_first_batch, new_network
from bnlab.training.checkpoint import load_state, save_state
from bnlab.training.memory_advice import batch_errors
from bnlab.training.schedule import Plan
from bnlab.training.state import TrainState
from bnlab.training.validate import (
    ValidationResult,
    Validator,
    calibration_batches,
    keeps_statistics,
    recalibrate_network,
)

_WORTH_SAVING = 20.0  # seconds: a training that was interrupted earlier is begun anew
_CACHE_BYTES = 2**31  # of decoded photos in memory

MakeNetwork = Callable[[Recipe, int], TableNetwork]
"""Makes a network from a recipe and a number of classes."""


class Probe:
    """Measures while a network is trained. Its rows are saved in checkpoints.

    A probe has to leave the network, its flags and its gradients as they were.
    """

    saved: tuple[str, ...] = ()  # Names of further attributes that checkpoints keep.

    def __init__(self, every: int = 1) -> None:
        self.every = every  # steps from one row to the next, if the probe writes rows at equal distances
        self.results: Results = {}

    def write(self, table: str, row: Row) -> None:
        self.results.setdefault(table, []).append(row)

    def begin(self, context: TrainingContext) -> None:
        """Called before the first step, and again when an interrupted training is resumed."""

    def before(self, step: int, context: TrainingContext) -> None:
        """Called before each step. The first is 0."""

    def after(self, step: int, context: TrainingContext) -> None:
        """Called after each step."""

    def state_dict(self) -> dict[str, Any]:
        return {"tables": self.results} | {name: getattr(self, name) for name in self.saved}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.results = state["tables"]
        for name in self.saved:
            setattr(self, name, state[name])


@dataclass(frozen=True, kw_only=True)
class TrainedNetwork:
    context: TrainingContext
    """The network has the weights of the last step. If the training diverged, they are of no use."""
    results: Results = field(default_factory=dict)
    """The tables of the probe, and "accuracy" with a row for each validation."""
    diverged: bool = False

    def evaluation(self, split: str, statistics: str = "running", *, images: int = 1024) -> Evaluation:
        """Evaluate on train, val or test, by running, recalibrated (on so many photos) or batch statistics.

        Photos are shuffled, since a batch of one class has other statistics. The network is left as it was.

        Raises:
            DivergedError: the outputs or the recalibrated statistics are not finite.
        """
        network, recipe = self.context.network, self.context.recipe
        photos = self.context.dataset.in_split(split)
        photos = photos[random_stream(recipe.seed, Use.EVALUATION_ORDER).permutation(len(photos))]
        with preserving_state(network):
            if statistics == "recalibrated":
                self.recalibrate(images)
            elif statistics == "batch":
                use_batch_statistics(network)
            classifier = Classifier(network, card_of(self.context))
            return evaluate(classifier, photos, split, batch_size=recipe.batch_size, workers=0)

    def recalibrate(self, images: int = 1024) -> None:
        """Measure the population statistics anew, on so many photos of train as inference sees them.

        Raises:
            DivergedError: they are not finite.
        """
        context = self.context
        if keeps_statistics(context.network):
            batches = calibration_batches(context, images, context.recipe.batch_size)
            recalibrate_network(context.network, batches)


def train(
    job: JobContext, recipe: Recipe, *, probe: Probe | None = None, make: MakeNetwork | None = None
) -> TrainedNetwork:
    """Train a network by the recipe with the seed and the split of the job, or resume the job's checkpoint.

    When the recipe says so, it is validated on val and test by recalibrated statistics, which adds a row of accuracies
    (0..1) to the table "accuracy". If the training diverges, the rows of the remaining validations have the accuracy of
    the majority baseline, and the last row has the step at which it diverged.
    """
    probe = probe or Probe()
    recipe = recipe.model_copy(update={"seed": job.seed})
    dataset = open_recorded_data(job.split)
    network = make(recipe, len(dataset.classes)) if make else new_network(recipe, classes=len(dataset.classes))[0]
    cache = _shared_cache(job.split, "train", str(cached_side(recipe)), len(dataset.in_split("train")))
    context = build_context(recipe, network, dataset, job.device, cache)
    # Val, by which things are chosen, and test, which is reported, are validated on in one pass.
    photos = Photos.of([*dataset.in_split("val"), *dataset.in_split("test")])
    preprocessing, images = str(context.preprocessing), recipe.recalibration_images
    validator = Validator(
        context,
        photos,
        sample_cache=_shared_cache(job.split, f"sample {images}", preprocessing, images),
        val_cache=_shared_cache(job.split, "val and test", preprocessing, len(photos)),
        evaluate_running=False,
    )
    run = Run(job.folder)
    job.folder.mkdir(parents=True, exist_ok=True)
    if not run.split.exists():
        run.split.write_bytes(job.split.read_bytes())
    parts = context.parts() | {"probe": probe}
    state = load_state(run, recipe, parts)
    job.report_steps(state.step)

    @contextmanager
    def around_step(step: int) -> Iterator[None]:
        probe.before(step, context)
        yield
        probe.after(step, context)
        job.report_steps(1)

    def validate() -> ValidationResult:
        validation = validator(context.network, NullProgress())
        probe.write("accuracy", _accuracies(state, validation.evaluation, dataset))
        return validation

    def save(state: TrainState) -> None:
        if state.total_seconds > _WORTH_SAVING:
            save_state(run, state, recipe, parts)

    diverged = False
    with loop.deterministic(job.device), batch_errors(context):
        if not state.plan.steps:
            init_on_first_batch(context)
            state.plan = Plan.of(recipe, context.loader.batches)
        probe.begin(context)
        callbacks = loop.Callbacks(validate=validate, save=save, epoch_done=lambda *_: None, around_step=around_step)
        try:
            loop.fit(context, state, callbacks, progress=NullProgress())
        except DivergedError:
            diverged = True
            for step in _remaining_validations(state.plan, state.step):
                probe.write("accuracy", baseline_row(step, dataset))
            probe.results["accuracy"][-1]["diverged_at"] = state.step
    return TrainedNetwork(context=context, results=probe.results, diverged=diverged)


def measure_accuracy(job: JobContext, recipe: Recipe) -> Results:
    """The measurement that most studies need: a training and its accuracies."""
    return {"accuracy": train(job, recipe).results["accuracy"]}


def with_norm(layer: type[BatchNorm]) -> MakeNetwork:
    """Makes the recipe's network with a study's own normalisation layer, from the same initial weights."""

    def make(recipe: Recipe, classes: int) -> TableNetwork:
        norm = partial(layer, eps=recipe.norm_eps, momentum=recipe.norm_momentum)
        return new_network(recipe, classes=classes, norm=norm)[0]

    return make


def sample_of_train(context: TrainingContext, images: int) -> tuple[Tensor, Tensor]:
    """Up to `images` photos of train, as inference sees them, and their class indices: N x 3 x H x W, and N."""
    loader = context.loader
    labels = torch.from_numpy(loader.labels[loader.sample(images)]).to(context.device)
    return next(calibration_batches(context, images, batch_size=images)), labels


def or_guess(measured: Callable[[], float], guess: float) -> float:
    """An accuracy, or that of guessing where the network or its statistics are not finite."""
    try:
        return measured()
    except DivergedError:
        return guess


def majority_baseline(dataset: Dataset) -> float:
    """The accuracy on test of always answering with its most common class."""
    targets = dataset.in_split("test").class_indices(dataset.classes)
    return float(np.bincount(targets).max() / len(targets))


def baseline_row(step: int, dataset: Dataset, **measured: Value) -> Row:
    """A row of the table "accuracy". What was not measured is that of the majority baseline, or None."""
    baseline = majority_baseline(dataset)
    return {
        "step": step,
        "train_loss": None,
        "train_top1": None,
        "val_top1": baseline,
        "test_top1": baseline,
        "test_loss": None,
        "n_test": len(dataset.in_split("test")),
        "guess": baseline,
        "diverged_at": None,
        **measured,
    }


def _accuracies(state: TrainState, evaluation: Evaluation, dataset: Dataset) -> Row:
    num_val = len(dataset.in_split("val"))
    correct = evaluation.predicted == evaluation.targets
    targets = evaluation.targets[num_val:]
    probabilities = evaluation.probabilities[num_val:][np.arange(len(targets)), targets]  # of the right classes
    return baseline_row(
        state.step,
        dataset,
        train_loss=state.loss / max(state.num_images, 1),
        train_top1=state.num_correct / max(state.num_images, 1),
        val_top1=float(correct[:num_val].mean()),
        test_top1=float(correct[num_val:].mean()),
        test_loss=float(-np.log(np.maximum(probabilities, np.finfo(np.float32).tiny)).mean()),
    )


@lru_cache(maxsize=6)
def _shared_cache(split: Path, photos: str, preprocessing: str, number: int) -> Cache:
    """A cache of decoded photos that the measurements of a process share."""
    return Cache(number, _CACHE_BYTES)


def _remaining_validations(plan: Plan, after: int) -> list[int]:
    """The steps after `after` at which a training would be validated."""
    epochs = [epoch for epoch in range(plan.epochs) if plan.validates(epoch)]
    ends = [min(plan.steps, (epoch + 1) * plan.batches) for epoch in epochs]
    return [step for step in ends if step > after] or [plan.steps]
