"""The shapes of the networks, one row a layer. Comments: C x H x W of the output at the network's own input size."""

from typing import NamedTuple


class Conv(NamedTuple):
    """A convolution, its normalisation and ReLU, padded to keep the size at stride 1."""

    name: str
    channels: int
    kernel: int
    stride: int = 1


class MaxPool(NamedTuple):
    """3 x 3 max pooling with stride 2, in ceil mode."""

    name: str


class Inception(NamedTuple):
    """Four branches side by side, concatenated: 1x1 | 1x1, 3x3 | 1x1, 3x3, 3x3 | 3x3 max pool, 1x1."""

    name: str
    one: int
    reduce3: int
    three: int
    reduce5: int
    five: int
    pool: int


class Auxiliary(NamedTuple):
    """An auxiliary classifier on the output of the layer above it, in training alone."""

    name: str


Table = tuple[Conv | MaxPool | Inception | Auxiliary, ...]

# Szegedy et al. 2015, Table 1. The 5 x 5 convolution is two 3 x 3 of the same width, as Inception v2 has it.
GOOGLENET: Table = (
    Conv("conv1", 64, 7, stride=2),  # 64 x 112 x 112
    MaxPool("pool1"),  # 64 x 56 x 56
    Conv("conv2", 64, 1),  # 64 x 56 x 56
    Conv("conv3", 192, 3),  # 192 x 56 x 56
    MaxPool("pool2"),  # 192 x 28 x 28
    Inception("inception3a", 64, 96, 128, 16, 32, 32),  # 256 x 28 x 28
    Inception("inception3b", 128, 128, 192, 32, 96, 64),  # 480 x 28 x 28
    MaxPool("pool3"),  # 480 x 14 x 14
    Inception("inception4a", 192, 96, 208, 16, 48, 64),  # 512 x 14 x 14
    Auxiliary("aux1"),
    Inception("inception4b", 160, 112, 224, 24, 64, 64),  # 512 x 14 x 14
    Inception("inception4c", 128, 128, 256, 24, 64, 64),  # 512 x 14 x 14
    Inception("inception4d", 112, 144, 288, 32, 64, 64),  # 528 x 14 x 14
    Auxiliary("aux2"),
    Inception("inception4e", 256, 160, 320, 32, 128, 128),  # 832 x 14 x 14
    MaxPool("pool4"),  # 832 x 7 x 7
    Inception("inception5a", 256, 160, 320, 32, 128, 128),  # 832 x 7 x 7
    Inception("inception5b", 384, 192, 384, 48, 128, 128),  # 1024 x 7 x 7
)

# GoogLeNet's block at the scale of a 32 px picture, for studies and for the demo.
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
