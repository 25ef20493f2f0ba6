"""Train a batch-normalised image classifier on your own photos, and measure what batch normalisation does for it.

>>> from bnlab import Classifier, train, split, nets, norm
"""

from importlib import import_module
from time import monotonic as _monotonic
from typing import TYPE_CHECKING

from bnlab import errors
from bnlab.errors import (
    BnlabError,
    ClassifierError,
    DataError,
    DivergedError,
    Interrupted,
    OutOfMemoryError,
    PhotoError,
    RecipeError,
    RunError,
    ShapeError,
    StorageError,
    UsageError,
)

_imported = _monotonic()  # soon after the start of the process, if it is the command line's

if TYPE_CHECKING:
    from bnlab import health, nets, norm, testing
    from bnlab.api import evaluate, find_lr, import_weights, predict, resume, split, study, train
    from bnlab.classifier.ensemble import Ensemble
    from bnlab.classifier.evaluate import Evaluation
    from bnlab.classifier.predict import Candidate, Classifier, Prediction
    from bnlab.commands.evaluate import EvaluateResult
    from bnlab.commands.import_weights import ImportResult
    from bnlab.commands.predict import PredictResult
    from bnlab.commands.split import SplitResult
    from bnlab.commands.study import StudyResult
    from bnlab.commands.train import FindLrResult
    from bnlab.data.scan import Refusal
    from bnlab.machine import tune_allocator
    from bnlab.progress import Progress
    from bnlab.training.session import TrainingResult

__version__ = "0.1.0"
__all__ = [
    "BnlabError",
    "Candidate",
    "Classifier",
    "ClassifierError",
    "DataError",
    "DivergedError",
    "Ensemble",
    "EvaluateResult",
    "Evaluation",
    "FindLrResult",
    "ImportResult",
    "Interrupted",
    "OutOfMemoryError",
    "PhotoError",
    "PredictResult",
    "Prediction",
    "Progress",
    "RecipeError",
    "Refusal",
    "RunError",
    "ShapeError",
    "SplitResult",
    "StorageError",
    "StudyResult",
    "TrainingResult",
    "UsageError",
    "errors",
    "evaluate",
    "find_lr",
    "health",
    "import_weights",
    "nets",
    "norm",
    "predict",
    "resume",
    "split",
    "study",
    "testing",
    "train",
    "tune_allocator",
]

# Imported at first use, so that `import bnlab`, and with it `bnlab --help`, does not take the seconds of torch.
_MODULES = {
    "bnlab.api": "evaluate find_lr import_weights predict resume split study train",
    "bnlab.classifier.ensemble": "Ensemble",
    "bnlab.classifier.evaluate": "Evaluation",
    "bnlab.classifier.predict": "Candidate Classifier Prediction",
    "bnlab.commands.evaluate": "EvaluateResult",
    "bnlab.commands.import_weights": "ImportResult",
    "bnlab.commands.predict": "PredictResult",
    "bnlab.commands.split": "SplitResult",
    "bnlab.commands.study": "StudyResult",
    "bnlab.commands.train": "FindLrResult",
    "bnlab.data.scan": "Refusal",
    "bnlab.machine": "tune_allocator",
    "bnlab.progress": "Progress",
    "bnlab.training.session": "TrainingResult",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name in ("health", "nets", "norm", "testing"):
        return import_module(f"bnlab.{name}")
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'bnlab' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
