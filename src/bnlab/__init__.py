"""Train a batch-normalised image classifier on your own photos, know what batch normalisation does for it, and ship it.

>>> from bnlab import Classifier, train, split, nets, norm
"""

from importlib import import_module
from typing import TYPE_CHECKING

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

# Imported when first asked for: `import bnlab`, and so `bnlab --help`, costs no seconds of torch.
_WHERE = {
    "BnlabError": "bnlab.errors",
    "Candidate": "bnlab.classifier.predict",
    "Classifier": "bnlab.classifier.predict",
    "Prediction": "bnlab.classifier.predict",
    "import_weights": "bnlab.api",
    "resume": "bnlab.api",
    "split": "bnlab.api",
    "train": "bnlab.api",
    "tune_allocator": "bnlab.machine",
}


def __getattr__(name: str) -> object:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    if name in ("nets", "norm"):
        return import_module(f"bnlab.{name}")
    raise AttributeError(f"module 'bnlab' has no attribute '{name}'")
