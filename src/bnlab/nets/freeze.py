"""Fine-tuning: parts of a network that stay as they are."""

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
    """What no longer changes in training."""

    layers: tuple[str, ...]
    """rows of the table with anything to train in them, all of each"""
    parameters: int
    """numbers that are not trained"""
    of: int
    """numbers that inference needs, so trained or not"""
    norms: int
    """normalisation layers whose statistics, gamma and beta stay"""

    def __str__(self) -> str:
        """In a line, as a report has it; nothing frozen: an empty one."""
        if not self.parameters and not self.norms:
            return ""
        first, last = (self.layers[0], self.layers[-1]) if self.layers else ("", "")
        what = [first if first == last else f"{first} to {last}"] if self.layers else []
        if self.norms:
            what += [f"the statistics, gamma and beta of {plural(self.norms, 'normalisation layer')}"]
        return f"{' and '.join(what)} ({self.parameters:,} of {self.of:,} parameters)"


def freeze(network: TableNetwork, part: Part, *, norms: bool) -> Frozen:
    """Train no more the "stem" (all before the first Inception block) or the "backbone" (all before the last layer).

    Its normalisation layers are frozen, too: they normalise by the statistics they have, in training as well, and a
    later `train()` does not undo it. With `norms` so are those of the whole backbone. Auxiliary heads are never frozen.

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
        raise UsageError(f"{network.name} has no stem to freeze", "say backbone or none")
    return network.order[: blocks[0]]


def _norms(module: nn.Module) -> list[StatisticsMode]:
    return [m for m in module.modules() if isinstance(m, StatisticsMode)]
