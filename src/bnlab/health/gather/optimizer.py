"""Reads which parameters the caller's optimiser changes, and which of the normalisation layers' it decays."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bnlab.health.evidence import Evidence
from bnlab.health.subject import Subject


@dataclass(frozen=True)
class OptimizerEvidence:
    """What an optimiser does to the parameters of the network. Names are those of `named_parameters`."""

    kind: str
    """name of the class"""
    decay: Mapping[str, Mapping[str, float]]
    """weight decay of gamma ("weight") and beta ("bias"), by layer; only trained ones that the optimiser has"""
    missing: tuple[str, ...]
    """parameters that have requires_grad, but are not in the optimiser"""
    shared: int
    """parameters of the network that the optimiser has"""
    foreign: int
    """parameters of the optimiser that the network does not have"""


def gather(subject: Subject, evidence: Evidence) -> dict[str, Any]:
    """The part "optimizer", if the caller passed an optimiser."""
    optimizer = subject.given.optimizer
    if optimizer is None:
        return {}
    try:
        decays = {
            id(parameter): float(group.get("weight_decay") or 0.0)
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
    except Exception as error:  # it may be of any class
        subject.notes.append(f"the parameters of the optimiser cannot be read ({type(error).__name__})")
        return {}
    own = dict(subject.network.named_parameters())
    shared = [name for name, parameter in own.items() if id(parameter) in decays]
    decay: dict[str, dict[str, float]] = {}
    for name, layer in subject.layers.items():
        for key in ("weight", "bias"):
            parameter = layer._parameters.get(key)
            if isinstance(parameter, Tensor) and parameter.requires_grad and id(parameter) in decays:
                decay.setdefault(name, {})[key] = decays[id(parameter)]
    return {
        "optimizer": OptimizerEvidence(
            kind=type(optimizer).__name__,
            decay=decay,
            missing=tuple(n for n, parameter in own.items() if parameter.requires_grad and id(parameter) not in decays),
            shared=len(shared),
            foreign=len(decays) - len(shared),
        )
    }
