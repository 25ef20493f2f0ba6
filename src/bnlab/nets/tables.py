"""The shapes of the networks, one row a layer. Comments: C x H x W of the output at the network's own input size."""

from functools import partial
from typing import Any, Literal, NamedTuple


class Conv(NamedTuple):
    """A convolution with its normalisation and activation, padded so that stride 1 keeps the size."""

    name: str
    channels: int
    kernel: int
    stride: int = 1
    multiplier: int = 0
    """0: a plain convolution. Else separable: so many filters on each input channel, then a 1 x 1 convolution."""


class MaxPool(NamedTuple):
    """Max pooling with stride 2, in ceil mode."""

    name: str
    kernel: int = 3


class LocalResponse(NamedTuple):
    """Local response normalisation, which a network has only if it is built with `local_response`."""

    name: str


class Inception(NamedTuple):
    """Concatenated branches: 1 x 1 | 1 x 1, 3 x 3 | 1 x 1, one layer for each of `kernels` | 3 x 3 pooling, 1 x 1."""

    name: str
    one: int  # 0: the block has no such branch.
    reduce3: int
    three: int
    reduce5: int
    five: int
    pool: int  # Channels of the 1 x 1 convolution after the 3 x 3 pooling. 0: the pooled map is passed on as it is.
    pooling: Literal["max", "avg"] = "max"
    stride: int = 1  # Of the last convolution of each branch, and of the pooling.
    kernels: tuple[int, ...] = (3, 3)  # Of the third branch: 5 x 5 in GoogLeNet, two 3 x 3 in BN-Inception.


class Auxiliary(NamedTuple):
    """An auxiliary classifier on the output of the layer above it, which runs in training only."""

    name: str


class FlattenPixels(NamedTuple):
    """The image, averaged to `side` x `side` pixels, as one vector."""

    name: str
    side: int


class Dense(NamedTuple):
    """A fully connected layer with its normalisation and activation."""

    name: str
    units: int


Row = Conv | MaxPool | LocalResponse | Inception | Auxiliary | FlattenPixels | Dense
Table = tuple[Row, ...]


# The first layers of both GoogLeNet and BN-Inception.
_STEM: Table = (
    Conv("conv1", 64, 7, stride=2),  # 64 x 112 x 112
    MaxPool("pool1"),  # 64 x 56 x 56
    LocalResponse("lrn1"),
    Conv("conv2", 64, 1),  # 64 x 56 x 56
    Conv("conv3", 192, 3),  # 192 x 56 x 56
    LocalResponse("lrn2"),
    MaxPool("pool2"),  # 192 x 28 x 28
)


def googlenet(kernels: tuple[int, ...] = (3, 3), last_pool: int = 3) -> Table:
    """Szegedy et al. 2015 (arXiv 1409.4842), Table 1, with `kernels` in place of its 5 x 5 convolutions."""
    block = partial(Inception, kernels=kernels)
    return (
        *_STEM,
        block("inception3a", 64, 96, 128, 16, 32, 32),  # 256 x 28 x 28
        block("inception3b", 128, 128, 192, 32, 96, 64),  # 480 x 28 x 28
        MaxPool("pool3"),  # 480 x 14 x 14
        block("inception4a", 192, 96, 208, 16, 48, 64),  # 512 x 14 x 14
        Auxiliary("aux1"),
        block("inception4b", 160, 112, 224, 24, 64, 64),  # 512 x 14 x 14
        block("inception4c", 128, 128, 256, 24, 64, 64),  # 512 x 14 x 14
        block("inception4d", 112, 144, 288, 32, 64, 64),  # 528 x 14 x 14
        Auxiliary("aux2"),
        block("inception4e", 256, 160, 320, 32, 128, 128),  # 832 x 14 x 14
        MaxPool("pool4", last_pool),  # 832 x 7 x 7
        block("inception5a", 256, 160, 320, 32, 128, 128),  # 832 x 7 x 7
        block("inception5b", 384, 192, 384, 48, 128, 128),  # 1024 x 7 x 7
    )


def inception(projection: int) -> Table:
    """Ioffe & Szegedy 2015 (arXiv 1502.03167), Fig. 5, with `projection` channels after the pooling of 4c and 4d.

    The figure contradicts itself there: it prints 128 channels, and an output of 576 channels, which needs 96.
    """
    return (
        *_STEM,
        Inception("inception3a", 64, 64, 64, 64, 96, 32, "avg"),  # 256 x 28 x 28
        Inception("inception3b", 64, 64, 96, 64, 96, 64, "avg"),  # 320 x 28 x 28
        Inception("inception3c", 0, 128, 160, 64, 96, 0, "max", stride=2),  # 576 x 14 x 14
        Inception("inception4a", 224, 64, 96, 96, 128, 128, "avg"),  # 576 x 14 x 14
        Auxiliary("aux1"),
        Inception("inception4b", 192, 96, 128, 96, 128, 128, "avg"),  # 576 x 14 x 14
        Inception("inception4c", 160, 128, 160, 128, 160, projection, "avg"),  # 608 (576 with 96) x 14 x 14
        Inception("inception4d", 96, 128, 192, 160, 192, projection, "avg"),  # 608 (576 with 96) x 14 x 14
        Auxiliary("aux2"),
        Inception("inception4e", 0, 128, 192, 192, 256, 0, "max", stride=2),  # 1056 (1024 with 96) x 7 x 7
        Inception("inception5a", 352, 192, 320, 160, 224, 128, "avg"),  # 1024 x 7 x 7
        Inception("inception5b", 352, 192, 320, 192, 224, 128, "max"),  # 1024 x 7 x 7
    )


# GoogLeNet's block at the scale of 32 x 32 pixels, for studies and for the demo.
SMALL_INCEPTION: Table = (
    Conv("conv1", 32, 3),  # 32 x 32 x 32
    MaxPool("pool1"),  # 32 x 16 x 16
    Inception("inception2a", 16, 16, 24, 8, 12, 12),  # 64 x 16 x 16
    Inception("inception2b", 24, 24, 36, 12, 18, 18),  # 96 x 16 x 16
    MaxPool("pool2"),  # 96 x 8 x 8
    Inception("inception3a", 32, 32, 48, 16, 24, 24),  # 128 x 8 x 8
    Inception("inception3b", 40, 40, 60, 20, 30, 30),  # 160 x 8 x 8
    MaxPool("pool3"),  # 160 x 4 x 4
    Inception("inception4a", 48, 48, 72, 24, 36, 36),  # 192 x 4 x 4
    Inception("inception4b", 48, 48, 72, 24, 36, 36),  # 192 x 4 x 4
)

# The network of Ioffe & Szegedy's first experiment (sec. 4.1), on 28 x 28 pixels.
MLP: Table = (
    FlattenPixels("pixels", 28),  # C * 784
    Dense("hidden1", 100),  # 100
    Dense("hidden2", 100),  # 100
    Dense("hidden3", 100),  # 100
)


def separable_stem(table: Table) -> Table:
    """The table with the paper's first layer: a separable convolution with depth multiplier 8."""
    first = table[0]
    assert isinstance(first, Conv)
    return (first._replace(multiplier=8), *table[1:])


def small_stem(table: Table) -> Table:
    """The table for small images: 3 x 3 with stride 1 first, no first pooling, so maps 4 times as high and wide."""
    first = table[0]
    assert isinstance(first, Conv)
    pool = next(i for i, row in enumerate(table) if isinstance(row, MaxPool))
    return (first._replace(kernel=3, stride=1), *table[1:pool], *table[pool + 1 :])


def widen(table: Table, factor: float) -> Table:
    """Multiply the channels of every layer, rounded to whole channels; no layer or branch vanishes."""

    def widened(row: Row) -> Row:
        keys = {"channels", "one", "reduce3", "three", "reduce5", "five", "pool", "units"}
        widths = {key: number for key, number in row._asdict().items() if key in keys and number}
        wider: dict[str, Any] = {key: max(1, int(number * factor + 0.5)) for key, number in widths.items()}
        return row._replace(**wider)

    return tuple(widened(row) for row in table)


def smallest_side(table: Table) -> int:
    """The least height and width of an image, in pixels, for which every layer has an output."""
    side = 1
    for row in reversed(table):
        match row:
            case Conv() | Inception():
                side = (side - 1) * row.stride + 1
            case MaxPool():
                side = 2 * side + row.kernel - 3
            case FlattenPixels():
                side = 1
    return side
