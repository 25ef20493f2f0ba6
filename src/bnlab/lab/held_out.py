"""What a study's trainings are judged on: val, by which things are chosen, and test, which is reported."""

from functools import lru_cache
from pathlib import Path

import numpy as np

from bnlab.classifier.card import Card
from bnlab.data.cache import Cache
from bnlab.data.photos import Photos
from bnlab.data.source import Source
from bnlab.lab.cells import Place
from bnlab.lab.records import Row
from bnlab.nets.network import TableNetwork
from bnlab.progress import Silent
from bnlab.recipe import Recipe
from bnlab.training.checkpoint import Position
from bnlab.training.judge import Judge, Judgement
from bnlab.training.loop import Trainee
from bnlab.training.trainee import view_of

_CACHE = 2**31  # bytes of decoded photos in memory


class HeldOut:
    """Judges a network on val and test in one go."""

    def __init__(self, place: Place, trainee: Trainee, source: Source) -> None:
        val, test = source.side("val"), source.side("test")
        recipe = trainee.recipe
        self.val, self.guess = len(val), guess_of(source)
        photos = Photos.of([*val, *test])
        look = str(trainee.view)
        caches = (
            decoded(place.split, f"sample {recipe.recalibrate}", look, recipe.recalibrate),
            decoded(place.split, "held out", look, len(photos)),
        )
        self.judge = Judge(
            trainee.network,
            card_of(recipe, trainee.network, source),
            trainee.device,
            loader=trainee.loader,
            val=photos,
            recalibrate=recipe.recalibrate if is_measurable(trainee.network) else 0,
            caches=caches,
            beside=False,
        )

    def __call__(self, network: TableNetwork) -> Judgement:
        """Judge a network as it is now."""
        return self.judge(network, Silent())

    def row(self, position: Position, judgement: Judgement) -> Row:
        """A row of the table "accuracy": the accuracies (0..1) at this point of a training."""
        found = judgement.evaluation
        right = found.predicted == found.targets
        test = found.probabilities[self.val :][np.arange(found.n - self.val), found.targets[self.val :]]
        return {
            "step": position.step,
            "train_loss": position.loss / max(position.seen, 1),
            "train_top1": position.right / max(position.seen, 1),
            "val_top1": float(right[: self.val].mean()),
            "test_top1": float(right[self.val :].mean()),
            "test_loss": float(-np.log(np.maximum(test, np.finfo(np.float32).tiny)).mean()),
            "n_test": found.n - self.val,
            "guess": self.guess,
            "diverged_at": None,
        }


def guess_of(source: Source) -> float:
    """The share of test that guessing gets right: who names its commonest class each time."""
    targets = source.side("test").class_indices(source.classes)
    return float(np.bincount(targets).max() / len(targets))


def guessing(step: int, source: Source) -> Row:
    """What a network that diverged comes to: as good as guessing."""
    row: Row = dict.fromkeys(_ACCURACY)
    guess, n = guess_of(source), len(source.side("test"))
    return row | {"step": step, "val_top1": guess, "test_top1": guess, "guess": guess, "n_test": n}


_ACCURACY = (
    "step",
    "train_loss",
    "train_top1",
    "val_top1",
    "test_top1",
    "test_loss",
    "n_test",
    "guess",
    "diverged_at",
)


def card_of(recipe: Recipe, network: TableNetwork, source: Source) -> Card:
    """A card for a network that is never written to a file."""
    return Card(network=recipe.network, arguments=network.arguments, classes=source.classes, view=view_of(recipe))


def is_measurable(network: TableNetwork) -> bool:
    """Whether it has layers that keep statistics."""
    return any(getattr(layer, "running_mean", None) is not None for layer in network.modules())


@lru_cache(maxsize=6)
def decoded(split: Path, side: str, look: str, photos: int) -> Cache:
    """Decoded photos of a side, shared by the cells of a process; `look` is how they are looked at."""
    return Cache(photos, _CACHE)
