"""What a study's trainings are judged on: val, by which things are chosen, and test, which is reported."""

from functools import lru_cache
from pathlib import Path

import numpy as np

from bnlab.data.cache import Cache
from bnlab.data.dataset import Dataset
from bnlab.data.photos import Photos
from bnlab.lab.measurements import JobContext
from bnlab.lab.records import Row
from bnlab.nets.network import TableNetwork
from bnlab.progress import NullProgress
from bnlab.training.build import TrainingContext
from bnlab.training.state import TrainState
from bnlab.training.validate import ValidationResult, Validator

_CACHE = 2**31  # bytes of shared_cache photos in memory


class HeldOut:
    """Judges a network on val and test in one go."""

    def __init__(self, job: JobContext, context: TrainingContext, dataset: Dataset) -> None:
        val, test = dataset.in_split("val"), dataset.in_split("test")
        recipe = context.recipe
        self.val, self.guess = len(val), majority_baseline(dataset)
        photos = Photos.of([*val, *test])
        look = str(context.preprocessing)
        caches = (
            shared_cache(job.split, f"sample {recipe.recalibration_images}", look, recipe.recalibration_images),
            shared_cache(job.split, "held out", look, len(photos)),
        )
        self.judge = Validator(context, photos, sample_cache=caches[0], val_cache=caches[1], evaluate_running=False)

    def __call__(self, network: TableNetwork) -> ValidationResult:
        """Judge a network as it is now."""
        return self.judge(network, NullProgress())

    def row(self, state: TrainState, validation: ValidationResult) -> Row:
        """A row of the table "accuracy": the accuracies (0..1) at this point of a training."""
        found = validation.evaluation
        right = found.predicted == found.targets
        test = found.probabilities[self.val :][np.arange(found.n - self.val), found.targets[self.val :]]
        return {
            "step": state.step,
            "train_loss": state.loss / max(state.num_images, 1),
            "train_top1": state.num_correct / max(state.num_images, 1),
            "val_top1": float(right[: self.val].mean()),
            "test_top1": float(right[self.val :].mean()),
            "test_loss": float(-np.log(np.maximum(test, np.finfo(np.float32).tiny)).mean()),
            "n_test": found.n - self.val,
            "guess": self.guess,
            "diverged_at": None,
        }


def majority_baseline(dataset: Dataset) -> float:
    """The share of test that guessing gets right: who names its commonest class each time."""
    targets = dataset.in_split("test").class_indices(dataset.classes)
    return float(np.bincount(targets).max() / len(targets))


def baseline_row(step: int, dataset: Dataset) -> Row:
    """What a network that diverged comes to: as good as guessing."""
    row: Row = dict.fromkeys(_ACCURACY)
    guess, n = majority_baseline(dataset), len(dataset.in_split("test"))
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


@lru_cache(maxsize=6)
def shared_cache(split: Path, side: str, look: str, photos: int) -> Cache:
    """Decoded photos of a side, shared by the cells of a process; `look` is how they are looked at."""
    return Cache(photos, _CACHE)
