"""A network trained for a study: by the product's own loop and settings, with someone looking on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bnlab.classifier.evaluate import Evaluation, evaluate
from bnlab.classifier.predict import Classifier
from bnlab.data.dataset import Dataset, open_recorded_data
from bnlab.errors import DivergedError
from bnlab.lab.held_out import HeldOut, baseline_row, majority_baseline, shared_cache
from bnlab.lab.measurements import JobContext
from bnlab.lab.records import Results, Row
from bnlab.nets.build import build
from bnlab.nets.network import TableNetwork
from bnlab.nets.options import MakeNorm
from bnlab.nets.registry import ARCHITECTURE_KEYS
from bnlab.norm.layers import StatisticsMode
from bnlab.progress import NullProgress
from bnlab.recipe import Recipe
from bnlab.runs import Run
from bnlab.training import loop
from bnlab.training.build import (
    TrainingContext,
    build_context,
    cached_side,
    card_of,
    init_on_first_batch,
    new_network,
)
from bnlab.training.checkpoint import load_state, save_state
from bnlab.training.memory_advice import batch_errors
from bnlab.training.schedule import Plan
from bnlab.training.state import TrainState
from bnlab.training.validate import ValidationResult, keeps_statistics, recalibrate_on

_WORTH_SAVING = 20.0  # seconds: a shorter training is begun anew

MakeNetwork = Callable[[Recipe, int], TableNetwork]
"""from a recipe and a number of classes"""


class Probe:
    """Looks on while a network is trained, and writes down; what it wrote survives an interruption.

    It must leave the network, its flags and its gradients as they were.
    """

    def __init__(self) -> None:
        self.results: Results = {}

    def write(self, table: str, row: Row) -> None:
        """A row for a table."""
        self.results.setdefault(table, []).append(row)

    def begin(self, context: TrainingContext) -> None:
        """The training is about to begin, or to go on."""

    def before(self, step: int, context: TrainingContext) -> None:
        """A step is about to begin; it is numbered from 0."""

    def after(self, step: int, context: TrainingContext) -> None:
        """The step is done."""

    def state_dict(self) -> dict[str, Any]:
        """What has to survive."""
        return {"tables": self.results}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Stand where it stood."""
        self.results = state["tables"]


@dataclass(frozen=True, kw_only=True)
class TrainedNetwork:
    """A training that is over."""

    context: TrainingContext
    """the network as the last step left it; where it diverged, of no use"""
    dataset: Dataset
    results: Results
    """what the witness wrote, and "accuracy": a row for each judgement"""
    diverged: bool

    def evaluation(self, split: str, statistics: str = "running", *, images: int = 1024) -> Evaluation:
        """The network on train, val or test, by running, recalibrated (on so many photos) or batch statistics.

        Batches are shuffled, for a batch of one class has other statistics. The network is as it was, afterwards.
        """
        network, recipe = self.context.network, self.context.recipe
        photos = self.dataset.in_split(split)
        photos = photos.take(np.random.default_rng(recipe.seed).permutation(len(photos)))
        with preserving_state(network):
            if statistics == "recalibrated":
                self.recalibrate(images)
            elif statistics == "batch":
                use_batch_statistics(network)
            classifier = Classifier(network, card_of(self.context), self.context.device)
            return evaluate(classifier, photos, split, batch_size=recipe.batch_size, workers=0)

    @property
    def majority_baseline(self) -> float:
        """The share of test that guessing gets right."""
        return majority_baseline(self.dataset)

    def recalibrate(self, images: int = 1024) -> None:
        """Measure the network's statistics anew, on so many photos of train as inference sees them.

        Raises:
            DivergedError: they are not finite.
        """
        context = self.context
        if keeps_statistics(context.network):
            paths = [context.loader.paths[i] for i in context.loader.sample(images)]
            size = context.recipe.batch_size
            recalibrate_on(context.network, paths, context.preprocessing, batch_size=size, device=context.device)


def train(
    job: JobContext, recipe: Recipe, *, probe: Probe | None = None, make: MakeNetwork | None = None
) -> TrainedNetwork:
    """Train a network by the recipe, on the sides that the place's seed gave the photos.

    Judged as the recipe has it, by statistics measured anew, on val and on test: of each judgement a row of the table
    "accuracy" has the accuracies (0..1). A training that diverges is written down as guessing from there on, its last
    row with the step at which it did.
    """
    probe = probe or Probe()
    recipe = recipe.model_copy(update={"seed": job.seed})
    dataset = open_recorded_data(job.split)
    network = make(recipe, len(dataset.classes)) if make else new_network(recipe, classes=len(dataset.classes))[0]
    cache = shared_cache(job.split, "train", str(cached_side(recipe)), len(dataset.in_split("train")))
    context = build_context(recipe, network, dataset, job.device, cache)
    held_out = HeldOut(job, context, dataset)
    run = Run(job.folder)
    job.folder.mkdir(parents=True, exist_ok=True)
    if not run.split.exists():
        run.split.write_bytes(job.split.read_bytes())
    parts = context.parts() | {"probe": probe}
    state = load_state(run, recipe, parts)
    job.report_steps(state.step)

    @contextmanager
    def watched(step: int) -> Iterator[None]:
        probe.before(step, context)
        yield
        probe.after(step, context)
        job.report_steps(1)

    def validate() -> ValidationResult:
        validation = held_out(context.network)
        probe.write("accuracy", held_out.row(state, validation))
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
        hooks = loop.Callbacks(validate=validate, save=save, epoch_done=lambda *_: None, around_step=watched)
        try:
            loop.fit(context, state, hooks, progress=NullProgress())
        except DivergedError:
            diverged = True
            for step in remaining_validation_steps(state.plan, recipe, state.step):
                probe.write("accuracy", baseline_row(step, dataset))
            probe.results["accuracy"][-1]["diverged_at"] = state.step
    return TrainedNetwork(context=context, dataset=dataset, results=probe.results, diverged=diverged)


def or_guess(measured: Callable[[], float], guess: float) -> float:
    """An accuracy, or that of guessing where the network or its statistics are not finite."""
    try:
        return measured()
    except DivergedError:
        return guess


def with_norm(norm: MakeNorm) -> MakeNetwork:
    """Makes the recipe's network with a normalisation of the study's own, from the same initial weights."""

    def make(recipe: Recipe, classes: int) -> TableNetwork:
        options: dict[str, Any] = {
            key: getattr(recipe, key) for key in (*ARCHITECTURE_KEYS, "dropout", "initialisation", "seed")
        }
        return build(recipe.network, classes=classes, **options | {"norm": norm})

    return make


def measure_accuracy(job: JobContext, recipe: Recipe) -> Results:
    """The cell that most studies need: a training, and its accuracies on the way."""
    return {"accuracy": train(job, recipe).results["accuracy"]}


def remaining_validation_steps(plan: Plan, recipe: Recipe, after: int) -> list[int]:
    """The steps at which a training is still to be judged."""
    ends = [
        min(plan.steps, (epoch + 1) * plan.batches) for epoch in range(plan.epochs) if plan.validates(recipe, epoch)
    ]
    return [step for step in ends if step > after] or [plan.steps]


def use_batch_statistics(network: TableNetwork) -> None:
    """Have it normalise by the batch in evaluation too, which moves nothing; `preserving_state` undoes it."""
    for layer in network.modules():
        if isinstance(layer, StatisticsMode):
            layer.statistics = "batch"


@contextmanager
def preserving_state(network: TableNetwork) -> Iterator[None]:
    """Whatever is done to the network's weights, statistics and flags is undone."""
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    training = {module: module.training for module in network.modules()}
    kinds = {layer: layer.statistics for layer in network.modules() if isinstance(layer, StatisticsMode)}
    try:
        yield
    finally:
        for layer, kind in kinds.items():
            layer.statistics = kind
        with torch.no_grad():
            network.load_state_dict(before)
        for module, mode in training.items():
            module.training = mode
