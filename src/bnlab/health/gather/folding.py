"""Folds the normalisation of a copy into its other layers, and compares the outputs on a few images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bnlab.health.evidence import Evidence
from bnlab.health.gather.parity import IMAGES, Parity, compare, outputs
from bnlab.health.subject import Subject
from bnlab.norm.folding.fold import fold
from bnlab.norm.recalibrate import evaluation_mode


@dataclass(frozen=True, kw_only=True)
class Folded:
    """What folding does to the outputs."""

    parity: Parity
    folded: tuple[str, ...]
    """layers that were folded into others"""
    kept: Mapping[str, str]
    """layers that cannot be folded, each with the reason"""


def gather(subject: Subject, evidence: Evidence) -> dict[str, Any]:
    """Fold once, and run a few images through both networks."""
    if not evidence.normalised or isinstance(subject.network, torch.jit.ScriptModule):
        return {}
    batch = subject.batches.sample(IMAGES)
    try:
        with evaluation_mode(subject.network), torch.no_grad():
            folding = fold(subject.network)
            if not folding.folded:
                return {}
            plain = outputs(subject, batch, subject.network)
            parity = compare(subject, batch, plain, outputs(subject, batch, folding.model), "folded")
    except Exception as error:  # of any type: it is the caller's own code
        subject.notes.append(f"folding could not be tried ({type(error).__name__})")
        return {}
    return {"folding": Folded(parity=parity, folded=tuple(folding.folded), kept=folding.kept)}
