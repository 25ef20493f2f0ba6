"""Train a batch-normalised image classifier on your own photos, and measure what batch normalisation does for it.

>>> from bnlab import Classifier, train, split, nets, norm
"""

from importlib import import_module
from time import monotonic as _monotonic
from typing import TYPE_CHECKING

_imported = _monotonic()  # soon after the start of the process, if it is the command line's

if TYPE_CHECKING:
    from bnlab import nets, norm
    from bnlab.api import import_weights, resume, split, train
    from bnlab.classifier.predict import Candidate, Classifier, Prediction
    from bnlab.errors import BnlabError
    from bnlab.machine import tune_allocator

__version__ = "0.1.0"
__all__ = [
    "BnlabError",
    "Candidate",
    "Classifier",
    "Prediction",
    "import_weights",
    "nets",
    "norm",
    "resume",
    "split",
    "train",
    "tune_allocator",
]

# Imported at first use, so that `import bnlab`, and with it `bnlab --help`, does not take the seconds of torch.
_MODULES = dict.fromkeys(("import_weights", "resume", "split", "train"), "bnlab.api")
_MODULES |= dict.fromkeys(("Candidate", "Classifier", "Prediction"), "bnlab.classifier.predict")
_MODULES |= {"BnlabError": "bnlab.errors", "tune_allocator": "bnlab.machine"}


def __getattr__(name: str) -> object:
    if name in ("nets", "norm"):
        return import_module(f"bnlab.{name}")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'bnlab' has no attribute '{name}'")
