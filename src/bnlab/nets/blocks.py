"""The blocks the tables are built of.

Shapes: N photos, C channels in, H x W the size of the map.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab.nets import tables
from bnlab.norm.layers import BatchNorm, BatchNorm2d


class ConvUnit(nn.Module):
    """Convolution, batch normalisation (or none), ReLU: in this order, as the paper places it (sec. 3.2).

    With batch normalisation the convolution has no bias: the mean would remove it, and beta takes its place.
    N x C x H x W in, N x channels x H/stride x W/stride out.
    """

    def __init__(self, inputs: int, channels: int, kernel: int, *, stride: int = 1, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, kernel, stride, padding=kernel // 2, bias=not norm)
        self.bn = BatchNorm2d(channels) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Normalised, rectified feature maps."""
        x = self.conv(x)  # N x channels x H/stride x W/stride
        if isinstance(self.bn, BatchNorm):
            return cast(Tensor, self.bn(x, relu=True))  # backward then keeps one tensor, not two
        return F.relu(self.bn(x), inplace=True)


class Inception(nn.Module):
    """The four branches of one row of a table. N x C x H x W in, N x `channels` x H x W out."""

    def __init__(self, inputs: int, row: tables.Inception, *, norm: bool) -> None:
        super().__init__()
        self.branch1 = ConvUnit(inputs, row.one, 1, norm=norm)
        self.branch2 = nn.Sequential(
            ConvUnit(inputs, row.reduce3, 1, norm=norm),
            ConvUnit(row.reduce3, row.three, 3, norm=norm),
        )
        self.branch3 = nn.Sequential(
            ConvUnit(inputs, row.reduce5, 1, norm=norm),
            ConvUnit(row.reduce5, row.five, 3, norm=norm),
            ConvUnit(row.five, row.five, 3, norm=norm),
        )
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), ConvUnit(inputs, row.pool, 1, norm=norm))
        self.channels = row.one + row.three + row.five + row.pool

    def forward(self, x: Tensor) -> Tensor:
        """The branches' feature maps, concatenated."""
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], dim=1)


class AuxiliaryHead(nn.Module):
    """A classifier on a middle layer, which gives early layers a shorter way to the loss.

    N x C x H x W in, for any H and W; N x classes out.
    """

    def __init__(self, inputs: int, classes: int, *, norm: bool) -> None:
        super().__init__()
        self.conv = ConvUnit(inputs, 128, 1, norm=norm)
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
    """Average pooling to 4 x 4: GoogLeNet's own windows (5 x 5, stride 3) on its 14 x 14 maps, adaptive ones on others.

    The adaptive windows are those of `F.adaptive_avg_pool2d`, as two products with the windows' matrices: that
    function's gradient on a GPU adds in no fixed order, which would break exact resuming.
    """
    height, width = x.shape[-2:]
    if (height, width) == (14, 14):
        return F.avg_pool2d(x, 5, stride=3)
    return torch.einsum("ih,nchw,jw->ncij", _windows(height, x), x, _windows(width, x))


def _windows(length: int, like: Tensor) -> Tensor:
    matrix = torch.zeros(4, length)
    for i in range(4):
        start, stop = i * length // 4, -(-(i + 1) * length // 4)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix.to(like)
