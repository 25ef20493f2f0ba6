"""From a table to a network."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnlab.errors import UsageError, did_you_mean, printable
from bnlab.nets import tables
from bnlab.nets.blocks import AuxiliaryHead, ConvUnit, Inception


class _Kind(NamedTuple):
    table: tables.Table
    norm: bool


_KINDS: Mapping[str, _Kind] = {
    "bn_googlenet": _Kind(tables.GOOGLENET, norm=True),
    "googlenet": _Kind(tables.GOOGLENET, norm=False),
    "bn_small_inception": _Kind(tables.SMALL_INCEPTION, norm=True),
    "small_inception": _Kind(tables.SMALL_INCEPTION, norm=False),
}
NETWORKS: tuple[str, ...] = tuple(_KINDS)


class TableNetwork(nn.Module):
    """A network as its table says: the rows in order, global average pooling, dropout and one linear layer.

    N x 3 x H x W in (normalised colours). In evaluation N x classes logits out; in training with auxiliary heads the
    tuple (main, last auxiliary, ..., first auxiliary), each N x classes.
    """

    def __init__(
        self, table: tables.Table, *, classes: int, norm: bool, dropout: float = 0.0, auxiliary: bool = False
    ) -> None:
        super().__init__()
        self.order: list[str] = []
        self.heads: dict[str, str] = {}  # layer -> the auxiliary head on its output
        channels = 3
        for row in table:
            match row:
                case tables.Conv():
                    self.add_module(
                        row.name, ConvUnit(channels, row.channels, row.kernel, stride=row.stride, norm=norm)
                    )
                    channels = row.channels
                case tables.MaxPool():
                    self.add_module(row.name, nn.MaxPool2d(3, stride=2, ceil_mode=True))
                case tables.Inception():
                    block = Inception(channels, row, norm=norm)
                    self.add_module(row.name, block)
                    channels = block.channels
                case tables.Auxiliary():
                    if auxiliary:
                        self.add_module(row.name, AuxiliaryHead(channels, classes, norm=norm))
                        self.heads[self.order[-1]] = row.name
                    continue
            self.order.append(row.name)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits (see the class)."""
        auxiliary = []
        for name in self.order:
            x = self.get_submodule(name)(x)
            if self.training and name in self.heads:
                auxiliary.append(self.get_submodule(self.heads[name])(x))  # N x classes
        x = x.mean((2, 3))  # N x C
        x = self.fc(self.dropout(x))  # N x classes
        return (x, *reversed(auxiliary)) if auxiliary else x

    def inference_state(self) -> dict[str, Tensor]:
        """The tensors that inference needs: all but the auxiliary heads'."""
        heads = tuple(f"{head}." for head in self.heads.values())
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(heads)}


def build(name: str, *, classes: int, dropout: float = 0.0, auxiliary: bool = False, seed: int = 0) -> TableNetwork:
    """A new network with weights that follow from `seed` alone; torch's own generator is left as it was.

    Raises:
        UsageError: there is no network of that name.
    """
    check_name(name)
    kind = _KINDS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TableNetwork(kind.table, classes=classes, norm=kind.norm, dropout=dropout, auxiliary=auxiliary)


def check_name(name: str) -> None:
    """Refuse what is no network's name.

    Raises:
        UsageError: there is no network of that name.
    """
    if name not in _KINDS:
        raise UsageError(f"no network is called '{printable(name)}'", did_you_mean(name, list(_KINDS)))


def to_device(network: TableNetwork, device: str) -> TableNetwork:
    """The network on a device, its filters with channels last in memory, as its images are."""
    return network.to(torch.device(device)).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _initialise(module: nn.Module) -> None:
    """He et al. 2015 for what a ReLU follows; small weights for linear layers, so that all classes start alike."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.01)
        nn.init.zeros_(module.bias)
