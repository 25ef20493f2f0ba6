"""The blocks that the networks are made of.

A block refuses an input of another shape than it takes with a ShapeError, which is a ValueError.

Shapes: N images, C input channels, H x W the size of the map; H' = ceil(H / stride), and W' likewise.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab.errors import ShapeError, UsageError
from bnlab.nets import tables
from bnlab.nets.options import MakeActivation, MakeNorm
from bnlab.norm.model_utils import FxLeaf, layer_name
from bnlab.norm.norm_activation import Placement, norm_activation

MakeLayer = Callable[..., "ConvNormAct"]
"""`conv_norm_act` or `linear_norm_act`, with all arguments given but the shapes."""


def check_images(layer: nn.Module, x: object, channels: int | None = None, *, smallest_side: int = 1) -> None:
    """Raise ShapeError unless x is N x C x H x W, of these channels (None: any), and H and W suffice.

    torch.fx's proxies, which have no shape yet, pass.
    """
    if not isinstance(x, Tensor):
        return
    if x.ndim != 4 or x.shape[1] != (x.shape[1] if channels is None else channels):
        wanted = f"N x {'C' if channels is None else channels} x H x W"
        raise ShapeError(f"{layer_name(layer)} takes {wanted}, and got {list(x.shape)}", "reshape the batch")
    if min(x.shape[2:]) < smallest_side:
        side = f"at least {smallest_side} x {smallest_side}"
        raise ShapeError(f"{layer_name(layer)} takes maps of {side}, and got {list(x.shape)}", "use larger images")


class ConvNormAct(nn.Module):
    """A convolution or a fully connected layer, its normalisation (or none) and its activation.

    Shapes: N x C x H x W in, N x channels x H' x W' out; with a fully connected layer N x C in, N x channels out.

    A bias in `layer` is redundant where normalisation follows directly, as the paper places it (sec. 3.2): the mean
    removes the bias, and beta replaces it.

    Args:
        layer: the convolution or fully connected layer; `state_dict` calls it "conv" or "linear".
        channels: its outputs.
        norm: makes the normalisation of so many channels; None for none.
        activation: makes the activation.
        placement: whether the normalisation is "before" or "after" the activation.

    Raises:
        UsageError: `norm` does not return a layer.
    """

    def __init__(
        self,
        layer: nn.Module,
        channels: int,
        *,
        norm: MakeNorm | None,
        activation: MakeActivation,
        placement: Placement,
    ) -> None:
        super().__init__()
        self.layer_name = "linear" if isinstance(layer, nn.Linear) else "conv"
        self.add_module(self.layer_name, layer)
        bn: object = nn.Identity() if norm is None else norm(channels)
        if not isinstance(bn, nn.Module):
            raise UsageError(f"norm made a {type(bn).__name__}, not a layer", "return an nn.Module")
        self.bn = bn
        self.activation = activation()
        self.placement: Placement = placement

    @property
    def layer(self) -> nn.Module:
        """The convolution (of a separable one, both in an nn.Sequential) or the fully connected layer."""
        return self.get_submodule(self.layer_name)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        x = self.layer(x)  # N x channels x H' x W', or N x channels
        return norm_activation(x, self.bn, self.activation, self.placement)

    def _check(self, x: object) -> None:
        first = self.layer[0] if isinstance(self.layer, nn.Sequential) else self.layer
        if isinstance(first, nn.Conv2d):
            check_images(self, x, first.in_channels)
        elif isinstance(first, nn.Linear) and isinstance(x, Tensor) and (x.ndim, x.shape[-1]) != (2, first.in_features):
            wanted = f"N x {first.in_features}"
            raise ShapeError(f"{layer_name(self)} takes {wanted}, and got {list(x.shape)}", "reshape the batch")


def conv_norm_act(
    inputs: int, channels: int, kernel: int, stride: int = 1, *, multiplier: int = 0, bias: bool, **options: Any
) -> ConvNormAct:
    """A ConvNormAct (with `options`) of a convolution that keeps the size at stride 1; `multiplier`: `tables.Conv`."""
    depthwise = inputs * multiplier
    if depthwise:
        layer: nn.Module = nn.Sequential(
            nn.Conv2d(inputs, depthwise, kernel, stride, kernel // 2, groups=inputs, bias=False),
            nn.Conv2d(depthwise, channels, 1, bias=bias),
        )
    else:
        layer = nn.Conv2d(inputs, channels, kernel, stride, kernel // 2, bias=bias)
    return ConvNormAct(layer, channels, **options)


def linear_norm_act(inputs: int, units: int, *, bias: bool, **options: Any) -> ConvNormAct:
    """A ConvNormAct (with `options`) of a fully connected layer."""
    return ConvNormAct(nn.Linear(inputs, units, bias=bias), units, **options)


def conv_norm_acts(network: nn.Module) -> list[ConvNormAct]:
    """Every ConvNormAct of a network, in the order of its modules."""
    return [module for module in network.modules() if isinstance(module, ConvNormAct)]


def is_normalised(network: nn.Module) -> bool:
    """Whether any ConvNormAct of the network has a normalisation."""
    return any(not isinstance(unit.bn, nn.Identity) for unit in conv_norm_acts(network))


class Inception(nn.Module):
    """The branches of one row of a table, concatenated. N x C x H x W in, N x `channels` x H' x W' out."""

    def __init__(self, inputs: int, row: tables.Inception, conv: MakeLayer) -> None:
        super().__init__()
        self.branch1 = conv(inputs, row.one, 1, row.stride) if row.one else None
        self.branch2 = nn.Sequential(conv(inputs, row.reduce3, 1), conv(row.reduce3, row.three, 3, row.stride))
        others = len(row.kernels) - 1
        widths, strides = [row.reduce5] + [row.five] * others, [1] * others + [row.stride]
        spatial = [conv(w, row.five, k, s) for w, k, s in zip(widths, row.kernels, strides, strict=True)]
        self.branch3 = nn.Sequential(conv(inputs, row.reduce5, 1), *spatial)
        projection = [conv(inputs, row.pool, 1)] if row.pool else []
        self.branch4 = nn.Sequential(BranchPool(row.pooling, row.stride), *projection)
        self.channels, self.stride = row.one + row.three + row.five + (row.pool or inputs), row.stride
        self.in_channels = inputs

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x, self.in_channels)
        maps = [] if self.branch1 is None else [self.branch1(x)]  # N x one x H' x W'
        maps += [self.branch2(x), self.branch3(x), self.branch4(x)]
        return torch.cat(maps, dim=1)  # N x channels x H' x W'


class BranchPool(FxLeaf):
    """3 x 3 pooling within an Inception block; N x C x H x W in, N x C x H' x W' out. The average includes the padding.

    With stride 2 its windows are those of TensorFlow's padding "same", so that its output is as large as that of the
    convolutions: they begin at the first pixel where the size is even (as in ceil mode), and are centred on it where
    the size is odd.
    """

    def __init__(self, kind: str, stride: int) -> None:
        super().__init__()
        self.kind, self.stride = kind, stride

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x)
        if self.kind == "avg":
            return F.avg_pool2d(x, 3, self.stride, padding=1)  # N x C x H x W
        padding = (1, 1) if self.stride == 1 else (x.shape[2] % 2, x.shape[3] % 2)
        return max_pool(x, 3, self.stride, padding, ceil_mode=True, training=self.training)  # N x C x H' x W'

    def extra_repr(self) -> str:
        return f"{self.kind}, stride={self.stride}"


class MaxPool(FxLeaf, nn.MaxPool2d):
    """`nn.MaxPool2d` without stored indices (see `max_pool`). N x C x H x W in, N x C x H' x W' out."""

    def forward(self, input: Tensor) -> Tensor:
        assert isinstance(self.kernel_size, int) and isinstance(self.padding, int)
        check_images(self, input, smallest_side=max(1, self.kernel_size - 1 - 2 * self.padding))
        window = (self.kernel_size, self.stride, self.padding)
        return max_pool(input, *window, ceil_mode=self.ceil_mode, training=self.training)  # N x C x H' x W'


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *window: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.window = window
        return cast(Tensor, torch.ops.aten.max_pool2d_with_indices(x, *window)[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        _, indices = torch.ops.aten.max_pool2d_with_indices(x, *ctx.window)
        dx = torch.ops.aten.max_pool2d_with_indices_backward(dy, x, *ctx.window, indices)
        return dx, *[None] * len(ctx.window)


def max_pool(x: Tensor, kernel: Any, stride: Any, padding: Any, *, ceil_mode: bool, training: bool) -> Tensor:
    """`F.max_pool2d` that in training finds the indices of the maxima again in backward, and so stores less.

    torch stores 8 bytes for each window, twice as much as the float32 value that it returns. torch.compile and the
    transforms of torch.func decide themselves what to store.
    """
    if not training or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode)
    return cast(Tensor, _MaxPool.apply(x, kernel, stride, padding, 1, ceil_mode))  # type: ignore[no-untyped-call]


class FlattenPixels(FxLeaf):
    """The image averaged to side x side pixels, as one vector; N x C x H x W in, N x (C * side * side) out."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x)
        return adaptive_avg_pool(x, self.side).flatten(1)  # N x C*side*side


class GlobalPool(nn.Module):
    """The mean of each map; N x C x H x W in, N x C out."""

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x)
        return x.mean((2, 3))  # N x C


class HeadPool(FxLeaf):
    """Average pooling before an auxiliary head; N x C x H x W in, for any H and W, N x C x 4 x 4 out."""

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x)
        if x.shape[-2:] == (14, 14):  # for these maps GoogLeNet has windows of 5 x 5 with stride 3
            return F.avg_pool2d(x, 5, stride=3)  # N x C x 4 x 4
        return adaptive_avg_pool(x, 4)  # N x C x 4 x 4


class AuxiliaryHead(nn.Module):
    """A classifier on a middle layer, which gives early layers a shorter path to the loss (Szegedy et al. 2015).

    Shapes: N x C x H x W in, for any H and W; N x classes logits out. Its fully connected layers always have ReLU and
    dropout of 0.5, whatever the options of the network are.
    """

    def __init__(self, inputs: int, classes: int, conv: MakeLayer) -> None:
        super().__init__()
        self.pool = HeadPool()
        self.conv = conv(inputs, 128, 1)
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.fc2 = nn.Linear(1024, classes)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.pool(x)).flatten(1)  # N x 2048
        x = F.relu(self.fc1(self.dropout(x)), inplace=True)  # N x 1024
        return cast(Tensor, self.fc2(self.dropout(x)))  # N x classes


def adaptive_avg_pool(x: Tensor, side: int) -> Tensor:
    """`F.adaptive_avg_pool2d` to side x side as two matrix products; N x C x H x W in, N x C x side x side out.

    torch's own gradient on a GPU adds in no fixed order, so that a resumed training would not repeat to the bit.
    """
    if x.shape[-2:] == (side, side):
        return x
    # Row i of each matrix averages the i-th window; windows overlap or repeat where `side` is not a divisor.
    rows, columns = (F.adaptive_avg_pool1d(torch.eye(n), side).T.contiguous().to(x) for n in x.shape[-2:])
    y = torch.einsum("ih,nchw,jw->ncij", rows, x, columns)
    return y.contiguous(memory_format=torch.channels_last)  # N x C x side x side
