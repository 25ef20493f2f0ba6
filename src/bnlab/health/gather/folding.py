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
    with subject.noting("folding could not be tried"), evaluation_mode(subject.network), torch.no_grad():
        folding = fold(subject.network)
        if folding.folded:
            plain = outputs(subject, batch, subject.network)
            parity = compare(subject, batch, plain, outputs(subject, batch, folding.model), "folded")
            return {"folding": Folded(parity=parity, folded=tuple(folding.folded), kept=folding.kept)}
    return {}
