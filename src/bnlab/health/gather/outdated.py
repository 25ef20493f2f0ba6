"""Finds what changed the weights after a training by itself: pruning, fake quantisation, averaging."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase
from torch.optim.swa_utils import AveragedModel

from bnlab.health.evidence import Evidence
from bnlab.health.subject import Subject


@dataclass(frozen=True, kw_only=True)
class Outdated:
    """Modules whose weights are not those that an optimiser left."""

    changed: Mapping[str, str]
    """what was done to each module, by its name: "pruned to 40% of the weights" """


def gather(subject: Subject, evidence: Evidence) -> dict[str, Any]:
    """Look at the modules; nothing is run."""
    if isinstance(subject.network, torch.jit.ScriptModule):
        return {}
    return {"outdated": Outdated(changed=dict(_changes(subject.network)))}


def _changes(network: nn.Module) -> Iterator[tuple[str, str]]:
    for name, module in network.named_modules():
        if isinstance(module, AveragedModel) and int(module.n_averaged) > 1:
            yield name, f"averaged over {int(module.n_averaged)} sets of weights"
        kept = [
            float(mask.count_nonzero()) / mask.numel()
            for key, mask in module._buffers.items()
            if isinstance(mask, Tensor)
            and key.endswith("_mask")
            and key.removesuffix("_mask") + "_orig" in module._parameters
        ]
        if kept and min(kept) < 1:
            yield name, f"pruned to {min(kept):.0%} of the weights"
        if any(_quantises(child) for key, child in module.named_children() if "weight" in key):
            yield name, "fake-quantised"


def _quantises(module: nn.Module) -> bool:
    return isinstance(module, FakeQuantizeBase) and bool(module.fake_quant_enabled[0])
