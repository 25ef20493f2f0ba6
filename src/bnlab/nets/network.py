"""The network that the rows of a table describe."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bnlab.errors import ShapeError
from bnlab.nets import blocks, tables
from bnlab.nets.blocks import MakeLayer
from bnlab.nets.tables import Table


class TableNetwork(nn.Module):
    """The rows of a table in order, global average pooling, dropout and one linear layer.

    Shapes: N x C x H x W in, C = `in_channels`, H and W at least `smallest_side`. In evaluation N x classes logits out;
    in training with auxiliary heads the tuple (main, last auxiliary, ..., first auxiliary), each N x classes.

    `build` sets `name`, the network's name in the registry, and `arguments`, those of `build` that inference needs.

    Raises:
        ShapeError: the input is not N x C x H x W, has other channels, or is too small.
    """

    name: str = "the network"
    arguments: Mapping[str, Any]

    def __init__(
        self,
        table: Table,
        *,
        in_channels: int,
        classes: int,
        conv: MakeLayer,
        linear: MakeLayer,
        dropout: float,
        local_response: bool,
        auxiliary: bool,
    ) -> None:
        super().__init__()
        self.in_channels = channels = in_channels
        self.smallest_side = tables.smallest_side(table)
        self.order: list[str] = []  # the names of the rows' layers
        self.heads: dict[str, str] = {}  # layer -> the auxiliary head on its output
        for row in table:
            layer: nn.Module
            match row:
                case tables.Conv():
                    layer = conv(channels, row.channels, row.kernel, row.stride, multiplier=row.multiplier)
                    channels = row.channels
                case tables.MaxPool():
                    layer = blocks.MaxPool(row.kernel, stride=2, ceil_mode=True)
                case tables.LocalResponse():
                    if not local_response:
                        continue
                    layer = nn.LocalResponseNorm(5)  # GoogLeNet's: alpha 1e-4, beta 0.75, k 1
                case tables.Inception():
                    layer = block = blocks.Inception(channels, row, conv)
                    channels = block.channels
                case tables.Auxiliary():
                    if auxiliary:
                        self.add_module(row.name, blocks.AuxiliaryHead(channels, classes, conv))
                        self.heads[self.order[-1]] = row.name
                    continue
                case tables.FlattenPixels():
                    layer = blocks.FlattenPixels(row.side)
                    channels *= row.side**2
                case tables.Dense():
                    layer = linear(channels, row.units)
                    channels = row.units
            self.add_module(row.name, layer)
            self.order.append(row.name)
        self.pool = nn.Identity() if isinstance(table[-1], tables.Dense) else blocks.GlobalPool()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        self._check(x)
        auxiliary = []
        for name in self.order:
            x = self.get_submodule(name)(x)  # the shapes stand in `tables.py`
            if self.training and name in self.heads:
                auxiliary.append(self.get_submodule(self.heads[name])(x))  # N x classes
        x = self.pool(x)  # N x features
        x = self.fc(self.dropout(x))  # N x classes
        return (x, *reversed(auxiliary)) if auxiliary else x

    def inference_state(self) -> dict[str, Tensor]:
        """The `state_dict` without the auxiliary heads."""
        heads = tuple(f"{head}." for head in self.heads.values())
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(heads)}

    def _check(self, x: object) -> None:
        if not isinstance(x, Tensor):  # a tracer passes its own proxy
            return
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            shape, remedy = " x ".join(map(str, x.shape)), "reshape the batch"
            if x.ndim == 4 and x.shape[3] == self.in_channels:
                remedy = "make the channels the second dimension: x.permute(0, 3, 1, 2)"
            raise ShapeError(f"{self.name} takes images of N x {self.in_channels} x H x W, not {shape}", remedy)
        self.check_size(*x.shape[2:])

    def check_size(self, height: int, width: int) -> None:
        """Raise ShapeError if images of that size, in pixels, are so small that a layer would have no output."""
        if min(height, width) < self.smallest_side:
            raise ShapeError(
                f"{self.name} cannot process images of {height} x {width} pixels",
                f"use at least {self.smallest_side} x {self.smallest_side}",
            )
