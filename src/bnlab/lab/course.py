"""A network trained for a study: by the product's own loop and settings, with someone looking on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bnlab.classifier.evaluate import Evaluation, evaluate
from bnlab.classifier.predict import Classifier
from bnlab.data.source import Source, open_recorded_data
from bnlab.errors import DivergedError
from bnlab.lab.cells import Place
from bnlab.lab.held_out import HeldOut, card_of, decoded, guess_of, guessing, is_measurable
from bnlab.lab.records import Row, Tables
from bnlab.nets.build import build, to_device
from bnlab.nets.catalogue import SHAPE
from bnlab.nets.network import TableNetwork
from bnlab.nets.options import MakeNorm
from bnlab.norm import recalibrate
from bnlab.norm.modes import Modes
from bnlab.progress import Silent
from bnlab.recipe import Recipe
from bnlab.runs import Run
from bnlab.training import checkpoint, loop
from bnlab.training.checkpoint import Position
from bnlab.training.judge import Judgement, sample_batches
from bnlab.training.loop import Trainee
from bnlab.training.schedule import Plan
from bnlab.training.setup import batch_errors, exact, fit_first_batch
from bnlab.training.start import new_network
from bnlab.training.trainee import make_trainee, shrunk_side

_WORTH_SAVING = 20.0  # seconds: a shorter training is begun anew

MakeNetwork = Callable[[Recipe, int], TableNetwork]
"""from a recipe and a number of classes"""


class Witness:
    """Looks on while a network is trained, and writes down; what it wrote survives an interruption.

    It must leave the network, its flags and its gradients as they were.
    """

    def __init__(self) -> None:
        self.tables: Tables = {}

    def write(self, table: str, row: Row) -> None:
        """A row for a table."""
        self.tables.setdefault(table, []).append(row)

    def begin(self, trainee: Trainee) -> None:
        """The training is about to begin, or to go on."""

    def before(self, step: int, trainee: Trainee) -> None:
        """A step is about to begin; it is numbered from 0."""

    def after(self, step: int, trainee: Trainee) -> None:
        """The step is done."""

    def state_dict(self) -> dict[str, Any]:
        """What has to survive."""
        return {"tables": self.tables}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Stand where it stood."""
        self.tables = state["tables"]


@dataclass(frozen=True, kw_only=True)
class Course:
    """A training that is over."""

    trainee: Trainee
    """the network as the last step left it; where it diverged, of no use"""
    source: Source
    tables: Tables
    """what the witness wrote, and "accuracy": a row for each judgement"""
    diverged: bool

    def evaluation(self, side: str, statistics: str = "running", *, images: int = 1024) -> Evaluation:
        """The network on train, val or test, by running, recalibrated (on so many photos) or batch statistics.

        Batches are shuffled, for a batch of one class has other statistics. The network is as it was, afterwards.
        """
        network, recipe = self.trainee.network, self.trainee.recipe
        photos = self.source.side(side)
        photos = photos.take(np.random.default_rng(recipe.seed).permutation(len(photos)))
        with restored(network):
            if statistics == "recalibrated":
                self.recalibrate(images)
            elif statistics == "batch":
                use_batch_statistics(network)
            classifier = Classifier(network, card_of(recipe, network, self.source), self.trainee.device)
            return evaluate(classifier, photos, side, batch_size=recipe.batch_size, workers=0)

    @property
    def guess(self) -> float:
        """The share of test that guessing gets right."""
        return guess_of(self.source)

    def recalibrate(self, images: int = 1024) -> None:
        """Measure the network's statistics anew, on so many photos of train as inference sees them.

        Raises:
            DivergedError: they are not finite.
        """
        trainee = self.trainee
        if is_measurable(trainee.network):
            paths = [trainee.loader.paths[i] for i in trainee.loader.sample(images)]
            size = trainee.recipe.batch_size
            batches = sample_batches(paths, trainee.view, batch_size=size, device=trainee.device)
            try:
                recalibrate(trainee.network, batches)
            except ValueError as error:
                if "not finite" not in str(error):
                    raise
                raise DivergedError(f"recalibration met {error}", "take a lower learning rate") from None


def train(place: Place, recipe: Recipe, *, witness: Witness | None = None, make: MakeNetwork | None = None) -> Course:
    """Train a network by the recipe, on the sides that the place's seed gave the photos.

    Judged as the recipe has it, by statistics measured anew, on val and on test: of each judgement a row of the table
    "accuracy" has the accuracies (0..1). A training that diverges is written down as guessing from there on, its last
    row with the step at which it did.
    """
    witness = witness or Witness()
    recipe = recipe.model_copy(update={"seed": place.seed})
    source = open_recorded_data(place.split)
    network = make(recipe, len(source.classes)) if make else new_network(recipe, classes=len(source.classes))[0]
    network = to_device(network, place.device)
    cache = decoded(place.split, "train", str(shrunk_side(recipe)), len(source.side("train")))
    trainee = make_trainee(recipe, network, source, place.device, cache)
    held_out = HeldOut(place, trainee, source)
    run = Run(place.folder)
    place.folder.mkdir(parents=True, exist_ok=True)
    if not run.split.exists():
        run.split.write_bytes(place.split.read_bytes())
    parts: dict[str, checkpoint.Stateful] = {"network": network, "optimizer": trainee.optimizer, "witness": witness}
    position = checkpoint.load_state(run, recipe, parts)
    place.tell(position.step)

    @contextmanager
    def watched(step: int) -> Iterator[None]:
        witness.before(step, trainee)
        yield
        witness.after(step, trainee)
        place.tell(1)

    def judged() -> Judgement:
        judgement = held_out(network)
        witness.write("accuracy", held_out.row(position, judgement))
        return judgement

    def save(position: Position) -> None:
        if position.total_seconds > _WORTH_SAVING:
            checkpoint.save_state(run, position, recipe, parts)

    diverged = False
    with exact(place.device), batch_errors(trainee):
        if not position.plan.steps:
            fit_first_batch(trainee)
            position.plan = Plan.of(recipe, trainee.loader.batches)
        witness.begin(trainee)
        hooks = loop.Hooks(judge=judged, save=save, epoch_done=lambda *_: None, watched=watched)
        try:
            loop.fit(trainee, position, hooks, progress=Silent())
        except DivergedError:
            diverged = True
            for step in judged_steps(position.plan, recipe, position.step):
                witness.write("accuracy", guessing(step, source))
            witness.tables["accuracy"][-1]["diverged_at"] = position.step
    return Course(trainee=trainee, source=source, tables=witness.tables, diverged=diverged)


def with_norm(norm: MakeNorm) -> MakeNetwork:
    """Makes the recipe's network with a normalisation of the study's own, from the same initial weights."""

    def make(recipe: Recipe, classes: int) -> TableNetwork:
        options: dict[str, Any] = {key: getattr(recipe, key) for key in (*SHAPE, "dropout", "initialisation", "seed")}
        return build(recipe.network, classes=classes, **options | {"norm": norm})

    return make


def accuracy(place: Place, recipe: Recipe) -> Tables:
    """The cell that most studies need: a training, and its accuracies on the way."""
    return {"accuracy": train(place, recipe).tables["accuracy"]}


def judged_steps(plan: Plan, recipe: Recipe, after: int) -> list[int]:
    """The steps at which a training is still to be judged."""
    ends = [min(plan.steps, (epoch + 1) * plan.batches) for epoch in range(plan.epochs) if plan.judges(recipe, epoch)]
    return [step for step in ends if step > after] or [plan.steps]


def use_batch_statistics(network: TableNetwork) -> None:
    """Have it normalise by the batch in evaluation too, which moves nothing; `restored` undoes it."""
    for layer in network.modules():
        if isinstance(layer, Modes):
            layer.statistics = "batch"


@contextmanager
def restored(network: TableNetwork) -> Iterator[None]:
    """Whatever is done to the network's weights, statistics and flags is undone."""
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    training = {module: module.training for module in network.modules()}
    kinds = {layer: layer.statistics for layer in network.modules() if isinstance(layer, Modes)}
    try:
        yield
    finally:
        for layer, kind in kinds.items():
            layer.statistics = kind
        with torch.no_grad():
            network.load_state_dict(before)
        for module, mode in training.items():
            module.training = mode
