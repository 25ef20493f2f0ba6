"""Freeze parts of a network for fine-tuning."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from bnlab.errors import UsageError, plural
from bnlab.nets.blocks import Inception
from bnlab.nets.network import TableNetwork
from bnlab.norm.layers import StatisticsMode

Part = Literal["none", "stem", "backbone"]


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """What training does not change."""

    layers: tuple[str, ...]
    """Frozen rows of the table that have parameters."""
    parameters: int
    """How many numbers are frozen."""
    of: int
    """How many numbers inference needs, frozen or not."""
    norms: int
    """How many normalisation layers keep their statistics, gamma and beta."""

    def __str__(self) -> str:
        """One line for a report; empty if nothing is frozen."""
        if not self.parameters and not self.norms:
            return ""
        first, last = (self.layers[0], self.layers[-1]) if self.layers else ("", "")
        what = [first if first == last else f"{first} to {last}"] if self.layers else []
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
    layers: list[str] = []
    if part != "none":
        layers = _stem(network) if part == "stem" else network.order
    for name in network.order:
        layer = network.get_submodule(name)
        if name in layers:
            layer.requires_grad_(False)
        if name in layers or norms:
            for norm in _norms(layer):
                norm.freeze()
    heads = {id(p) for head in network.heads.values() for p in network.get_submodule(head).parameters()}
    needed = [p for p in network.parameters() if id(p) not in heads]
    return Frozen(
        layers=tuple(name for name in layers if list(network.get_submodule(name).parameters())),
        parameters=sum(p.numel() for p in needed if not p.requires_grad),
        of=sum(p.numel() for p in needed),
        norms=sum(norm.frozen for norm in _norms(network)),
    )


def _stem(network: TableNetwork) -> list[str]:
    blocks = [i for i, name in enumerate(network.order) if isinstance(network.get_submodule(name), Inception)]
    if not blocks:
        raise UsageError(f"{network.name} has no stem to freeze", "use backbone or none")
    return network.order[: blocks[0]]


def _norms(module: nn.Module) -> list[StatisticsMode]:
    return [m for m in module.modules() if isinstance(m, StatisticsMode)]
