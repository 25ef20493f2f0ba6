"""Freeze parts of a network for fine-tuning."""

from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from bnlab.errors import UsageError, plural
from bnlab.nets.blocks import Inception
from bnlab.nets.network import TableNetwork
from bnlab.norm.freeze import Freezable
from bnlab.norm.freeze import freeze as freeze_norms

Part = Literal["none", "stem", "backbone"]


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """What training does not change."""

    layers: tuple[str, ...]  # Frozen rows of the table that have parameters.
    parameters: int
    of: int  # How many parameters inference needs, frozen or not.
    norms: int  # How many normalisation layers keep their statistics, gamma and beta.

    def __str__(self) -> str:
        """One line for a report; empty if nothing is frozen."""
        if not self.parameters and not self.norms:
            return ""
        what = [" to ".join(dict.fromkeys((self.layers[0], self.layers[-1])))] if self.layers else []
        if self.norms:
            what += [f"the statistics, gamma and beta of {plural(self.norms, 'normalisation layer')}"]
        return f"{' and '.join(what)} ({self.parameters:,} of {self.of:,} parameters)"


def freeze(network: TableNetwork, part: Part, *, norms: bool) -> Frozen:
    """Freeze the "stem" (all before the first Inception block), the "backbone" (all before the last layer) or "none".

    Frozen normalisation layers normalise by their running statistics in training as well, and a later `train()` does
    not change that. Auxiliary heads are never frozen.

    Args:
        network: in any mode.
        part: what to freeze.
        norms: freeze all normalisation layers of the backbone as well.

    Raises:
        UsageError: the network has no stem.
    """
    rows = {name: network.get_submodule(name) for name in network.order}
    stem = list(takewhile(lambda name: not isinstance(rows[name], Inception), rows))
    if part == "stem" and len(stem) == len(rows):
        raise UsageError(f"{network.name} has no stem to freeze", "use backbone or none")
    layers = {"none": [], "stem": stem, "backbone": list(rows)}[part]
    for name, layer in rows.items():
        if name in layers:
            layer.requires_grad_(False)
        if name in layers or norms:
            freeze_norms(layer)
    state = network.inference_state()
    needed = [p for name, p in network.named_parameters() if name in state]
    return Frozen(
        layers=tuple(name for name in layers if list(rows[name].parameters())),
        parameters=sum(p.numel() for p in needed if not p.requires_grad),
        of=sum(p.numel() for p in needed),
        norms=sum(isinstance(module, Freezable) and module.frozen for module in network.modules()),
    )
