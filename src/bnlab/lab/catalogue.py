"""The studies there are, in the order of the paper, then of those who answered it."""

from collections.abc import Mapping
from importlib import import_module

from bnlab.errors import UsageError, did_you_mean, printable
from bnlab.lab.study import Study

_MODULES = (
    "activations",
    "learning_rate",
    "seven_changes",
    "scale_invariance",
    "bias",
    "placement",
    "regularisation",
    "batch_size",
    "inference_statistics",
    "initialisation",
    "covariate_shift",
    "smoothness",
    "whitening",
    "ensemble",
)
NAMES: tuple[str, ...] = tuple(name.replace("_", "-") for name in _MODULES)


def studies() -> Mapping[str, Study]:
    """All, by name."""
    return {name: find(name) for name in NAMES}


def find(name: str) -> Study:
    """The study of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in NAMES:
        raise UsageError(f"no study is called '{printable(name)}'", did_you_mean(name, list(NAMES)))
    study: Study = import_module(f"bnlab.lab.studies.{name.replace('-', '_')}").STUDY
    return study
