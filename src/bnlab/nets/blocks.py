"""The blocks the tables are built of.

Shapes: N photos, C channels in, H x W the size of the map; H' = ceil(H / stride), W' likewise.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab.errors import UsageError
from bnlab.nets import tables
from bnlab.nets.options import MakeActivation, MakeNorm
from bnlab.norm.norm_activation import Placement, norm_activation

MakeConvNormAct = Callable[..., "ConvNormAct"]
"""`convolution` or `dense`, with all but the shapes settled"""


class ConvNormAct(nn.Module):
    """A convolution or a fully connected layer, its normalisation (or none), its activation: the one place for them.

    "before" the activation, as the paper places it (sec. 3.2), normalisation makes a bias redundant: the mean would
    remove it, and beta takes its place. So there is one only where nothing is normalised, where normalisation comes
    "after", and where it is asked for.
    """

    placement: Placement

    def __init__(
        self, layer: nn.Module, bn: nn.Module, activation: nn.Module, placement: Placement, *, name: str = "conv"
    ) -> None:
        super().__init__()
        self.layer_name = name  # "conv" and "linear" stand in the names of the weights
        self.add_module(name, layer)
        self.bn = bn
        self.activation = activation
        self.placement = placement

    @property
    def layer(self) -> nn.Module:
        """The convolution, or the fully connected layer."""
        return self.get_submodule(self.layer_name)

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W to N x channels x H' x W', or N x C to N x units."""
        x = self.layer(x)  # N x channels x H' x W', or N x units
        return norm_activation(x, self.bn, self.activation, self.placement)


def convolution(
    inputs: int,
    channels: int,
    kernel: int,
    stride: int = 1,
    *,
    multiplier: int = 0,
    norm: MakeNorm | None,
    activation: MakeActivation,
    placement: Placement,
    bias: bool,
) -> ConvNormAct:
    """A unit of a convolution padded to keep the size at stride 1; `multiplier` as in `tables.Conv`."""
    depthwise = inputs * multiplier
    if depthwise:
        layer: nn.Module = nn.Sequential(
            nn.Conv2d(inputs, depthwise, kernel, stride, kernel // 2, groups=inputs, bias=False),
            nn.Conv2d(depthwise, channels, 1, bias=bias),
        )
    else:
        layer = nn.Conv2d(inputs, channels, kernel, stride, kernel // 2, bias=bias)
    return ConvNormAct(layer, _normalisation(norm, channels), activation(), placement)


def dense(
    inputs: int,
    units: int,
    *,
    norm: MakeNorm | None,
    activation: MakeActivation,
    placement: Placement,
    bias: bool,
) -> ConvNormAct:
    """A unit of a fully connected layer."""
    layer = nn.Linear(inputs, units, bias=bias)
    return ConvNormAct(layer, _normalisation(norm, units), activation(), placement, name="linear")


def _normalisation(norm: MakeNorm | None, channels: int) -> nn.Module:
    if norm is None:
        return nn.Identity()
    layer: object = norm(channels)
    if not isinstance(layer, nn.Module):
        raise UsageError(f"norm made a {type(layer).__name__}, not a layer", "return an nn.Module")
    return layer


def conv_norm_acts(network: nn.Module) -> list[ConvNormAct]:
    """Every unit of a network."""
    return [module for module in network.modules() if isinstance(module, ConvNormAct)]


def is_normalised(network: nn.Module) -> bool:
    """Whether any of its units is."""
    return any(not isinstance(unit.bn, nn.Identity) for unit in conv_norm_acts(network))


class Inception(nn.Module):
    """The branches of one row of a table. N x C x H x W in, N x `channels` x H' x W' out."""

    def __init__(self, inputs: int, row: tables.Inception, unit: MakeConvNormAct) -> None:
        super().__init__()
        self.has_one = row.one > 0
        if self.has_one:
            self.branch1 = unit(inputs, row.one, 1, row.stride)
        self.branch2 = nn.Sequential(unit(inputs, row.reduce3, 1), unit(row.reduce3, row.three, 3, row.stride))
        others = len(row.kernels) - 1
        widths, strides = [row.reduce5] + [row.five] * others, [1] * others + [row.stride]
        spatial = [unit(w, row.five, k, s) for w, k, s in zip(widths, row.kernels, strides, strict=True)]
        self.branch3 = nn.Sequential(unit(inputs, row.reduce5, 1), *spatial)
        self.branch4 = nn.Sequential(Pool(row.pooling, row.stride), *([unit(inputs, row.pool, 1)] if row.pool else []))
        self.channels = row.one + row.three + row.five + (row.pool or inputs)

    def forward(self, x: Tensor) -> Tensor:
        """The branches' feature maps, concatenated."""
        maps = [self.branch1(x)] if self.has_one else []  # N x one x H' x W'
        maps += [self.branch2(x), self.branch3(x), self.branch4(x)]
        return torch.cat(maps, dim=1)  # N x channels x H' x W'


class Pool(nn.Module):
    """3 x 3 pooling within a block; N x C x H x W in, N x C x H' x W' out. The average counts the padding in.

    With stride 2 its windows lie as the padding "same" of TensorFlow has them, so that its output is as large as the
    convolutions' beside it: from the first pixel of an even side (as ceil mode has it), centred on it of an odd one.
    """

    def __init__(self, kind: str, stride: int) -> None:
        super().__init__()
        self.kind, self.stride = kind, stride

    def forward(self, x: Tensor) -> Tensor:
        """The largest, or the mean, of each window."""
        if self.kind == "avg":
            return F.avg_pool2d(x, 3, self.stride, padding=1)  # N x C x H x W
        pool = max_pool if self.training else F.max_pool2d
        if self.stride == 1:
            return pool(x, 3, 1, 1)  # N x C x H x W
        return pool(x, 3, 2, (x.shape[2] % 2, x.shape[3] % 2), ceil_mode=True)  # N x C x H' x W'

    def extra_repr(self) -> str:
        """What a printed network says of it."""
        return f"{self.kind}, stride={self.stride}"


class MaxPool(nn.MaxPool2d):
    """torch's, that keeps no indices for backward. N x C x H x W in, N x C x H' x W' out."""

    def forward(self, input: Tensor) -> Tensor:
        """The largest of each window."""
        pool = max_pool if self.training else F.max_pool2d
        return pool(input, self.kernel_size, self.stride, self.padding, ceil_mode=self.ceil_mode)  # N x C x H' x W'


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *window: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.window = window
        y: Tensor = torch.ops.aten.max_pool2d_with_indices(x, *window)[0]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        _, indices = torch.ops.aten.max_pool2d_with_indices(x, *ctx.window)
        dx = torch.ops.aten.max_pool2d_with_indices_backward(dy, x, *ctx.window, indices)
        return dx, *[None] * len(ctx.window)


def max_pool(x: Tensor, kernel: Any, stride: Any, padding: Any, *, ceil_mode: bool = False) -> Tensor:
    """`F.max_pool2d`, which looks once more, in backward, where the largest of each window was.

    torch keeps 8 bytes for each window, twice as much as the float32 value it gives.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode)  # what to keep is theirs to choose
    window = ([kernel] * 2, [stride] * 2, list(padding) if isinstance(padding, tuple) else [padding] * 2)
    pooled: Tensor = _MaxPool.apply(x, *window, [1, 1], ceil_mode)  # type: ignore[no-untyped-call]
    return pooled


class Pixels(nn.Module):
    """The picture averaged to side x side, as a vector; N x C x H x W in, N x (C * side * side) out."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """Channel by channel, row by row."""
        return shrink(x, self.side).flatten(1)  # N x C*side*side


class GlobalPool(nn.Module):
    """The mean of each map; N x C x H x W in, N x C out."""

    def forward(self, x: Tensor) -> Tensor:
        """One value a channel."""
        return x.mean((2, 3))  # N x C


class AuxiliaryHead(nn.Module):
    """A classifier on a middle layer, which gives early layers a shorter way to the loss.

    N x C x H x W in, for any H and W; N x classes out. Its fully connected layers have ReLU and dropout, whatever the
    network's own options are.
    """

    def __init__(self, inputs: int, classes: int, unit: MakeConvNormAct) -> None:
        super().__init__()
        self.conv = unit(inputs, 128, 1)
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.fc2 = nn.Linear(1024, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the middle layer."""
        x = pool_to_4x4(x)  # N x C x 4 x 4
        x = self.conv(x).flatten(1)  # N x 2048
        x = F.dropout(x, 0.5, self.training)
        x = F.relu(self.fc1(x), inplace=True)  # N x 1024
        x = F.dropout(x, 0.5, self.training)
        return cast(Tensor, self.fc2(x))  # N x classes


def pool_to_4x4(x: Tensor) -> Tensor:
    """Average pooling to 4 x 4: GoogLeNet's own windows (5 x 5, stride 3) on its 14 x 14 maps, adaptive elsewhere."""
    if x.shape[-2:] == (14, 14):
        return F.avg_pool2d(x, 5, stride=3)  # N x C x 4 x 4
    return shrink(x, 4)


def shrink(x: Tensor, side: int) -> Tensor:
    """The means of side x side windows, which overlap or repeat where `side` is no divisor; N x C x side x side out.

    The windows are those of `F.adaptive_avg_pool2d`, as two products with the windows' matrices: that function's
    gradient on a GPU adds in no fixed order, which would break exact resuming.
    """
    height, width = x.shape[-2:]
    if height == width == side:
        return x
    y = torch.einsum("ih,nchw,jw->ncij", _windows(height, side, x), x, _windows(width, side, x))
    return y.contiguous(memory_format=torch.channels_last)  # N x C x side x side


def _windows(length: int, side: int, like: Tensor) -> Tensor:
    matrix = torch.zeros(side, length)
    for i in range(side):
        start, stop = i * length // side, -(-(i + 1) * length // side)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix.to(like)
