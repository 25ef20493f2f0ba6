from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnlab import norm
from bnlab.errors import UsageError
from bnlab.nets import tables
from bnlab.nets.blocks import (
    AuxiliaryHead,
    BranchPool,
    FlattenPixels,
    GlobalPool,
    Inception,
    MaxPool,
    adaptive_avg_pool,
    conv_norm_act,
    linear_norm_act,
    max_pool,
)

PLAIN = partial(conv_norm_act, norm=None, activation=nn.Identity, placement="before", bias=False)
DENSE = partial(linear_norm_act, norm=None, activation=nn.Identity, placement="before", bias=False)


@pytest.mark.parametrize("placement", ["before", "after"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid])
def test_conv_norm_act_normalises_before_or_after_the_activation(placement: str, activation: type[nn.Module]) -> None:
    unit = conv_norm_act(
        3,
        5,
        3,
        2,
        norm=norm.BatchNorm2d,
        activation=activation,
        placement=placement,
        bias=True,  # type: ignore[arg-type]
    )
    bn = nn.BatchNorm2d(5)
    x = torch.randn(4, 3, 8, 8)
    y = F.conv2d(x, unit.layer.weight, unit.layer.bias, 2, 1)  # type: ignore[arg-type]
    expected = activation()(bn(y)) if placement == "before" else bn(activation()(y))
    torch.testing.assert_close(unit(x), expected)
    torch.testing.assert_close(unit.bn.running_var, bn.running_var)


def test_a_hook_on_the_normalisation_gets_its_output() -> None:
    """Normalisation and ReLU are one call only without hooks: together they have no negative outputs."""
    unit = conv_norm_act(3, 5, 1, norm=norm.BatchNorm2d, activation=nn.ReLU, placement="before", bias=False)
    seen: list[torch.Tensor] = []
    unit.bn.register_forward_hook(lambda _m, _i, output: seen.append(output.clone()))
    unit(torch.randn(4, 3, 8, 8))
    assert (seen[0] < 0).any()


@pytest.mark.parametrize("side", [1, 2, 5, 6, 7, 8, 14, 37])
def test_the_pooled_branch_is_as_large_as_the_convolved_ones(side: int) -> None:
    row = tables.Inception("x", 0, 2, 3, 2, 4, 0, "max", stride=2)
    y = Inception(5, row, PLAIN)(torch.randn(1, 5, side, side + 1))
    assert y.shape == (1, 3 + 4 + 5, -(-side // 2), -(-(side + 1) // 2))


@pytest.mark.parametrize("side", range(1, 12))
def test_pooling_with_stride_2_has_the_windows_of_same_padding(side: int) -> None:
    """TensorFlow's "same": as much padding as is needed, the larger half of it at the end."""
    x = torch.randn(2, 3, side, side)
    total = max((-(-side // 2) - 1) * 2 + 3 - side, 0)
    before, behind = total // 2, total - total // 2
    padded = F.pad(x, (before, behind, before, behind), value=-torch.inf)
    assert torch.equal(BranchPool("max", 2)(x), F.max_pool2d(padded, 3, 2))


def test_pooling_with_stride_2_is_ceil_mode_where_sides_are_even() -> None:
    x = torch.randn(2, 3, 28, 14)
    assert torch.equal(BranchPool("max", 2)(x), F.max_pool2d(x, 3, 2, ceil_mode=True))


def test_pooling_with_stride_1() -> None:
    x = torch.randn(2, 3, 7, 6)
    assert torch.equal(BranchPool("max", 1)(x), F.max_pool2d(x, 3, 1, 1))
    assert torch.equal(BranchPool("avg", 1)(x), F.avg_pool2d(x, 3, 1, 1, count_include_pad=True))


def test_branches_are_concatenated_in_order() -> None:
    row = tables.Inception("x", 1, 2, 3, 4, 5, 6, "avg", kernels=(5,))
    block = Inception(7, row, PLAIN)
    x = torch.randn(2, 7, 6, 6)
    parts = block(x).split([1, 3, 5, 6], dim=1)
    for part, branch in zip(parts, (block.branch1, block.branch2, block.branch3, block.branch4), strict=True):
        assert torch.equal(part, branch(x))
    kernels = [m.kernel_size for m in block.branch3.modules() if isinstance(m, nn.Conv2d)]
    assert kernels == [(1, 1), (5, 5)]


@pytest.mark.parametrize("shape", [(14, 14), (1, 1), (2, 2), (4, 4), (6, 6), (7, 9), (19, 19)])
def test_an_auxiliary_head_pools_to_4x4(shape: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    head = AuxiliaryHead(3, 2, PLAIN).double()
    pooled: list[torch.Tensor] = []
    head.conv.register_forward_pre_hook(lambda _module, inputs: pooled.extend(inputs))
    head(x)
    expected = F.avg_pool2d(x, 5, 3) if shape == (14, 14) else F.adaptive_avg_pool2d(x, 4)
    torch.testing.assert_close(pooled, [expected])


def test_flatten_pixels() -> None:
    x = torch.randn(2, 3, 28, 28)
    assert torch.equal(FlattenPixels(28)(x), x.flatten(1))
    assert torch.equal(FlattenPixels(28)(x.contiguous(memory_format=torch.channels_last)), x.flatten(1))
    larger = torch.randn(2, 1, 96, 64)
    torch.testing.assert_close(FlattenPixels(28)(larger), F.adaptive_avg_pool2d(larger, 28).flatten(1))
    assert adaptive_avg_pool(x, 28) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kernel", "stride", "padding", "ceil"), [(3, 2, 0, True), (2, 2, 0, True), (3, 1, 1, False)])
def test_max_pooling_is_torchs_without_the_indices(
    kernel: int, stride: int, padding: int, ceil: bool, dtype: torch.dtype
) -> None:
    """It has the same values and gradients, for ties as well, and stores its input only."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 5, (2, 8, 13, 14), generator=generator).to(dtype)  # full of ties
    x = x.contiguous(memory_format=torch.channels_last)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = max_pool(found, kernel, stride, padding, ceil_mode=ceil, training=True)
    z = F.max_pool2d(expected, kernel, stride, padding, ceil_mode=ceil)
    assert torch.equal(y, z)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert [t.shape for t in kept] == [x.shape]
    dy = torch.randn(y.shape, generator=generator).to(dtype)
    y.backward(dy)
    z.backward(dy)
    assert torch.equal(found.grad, expected.grad)


def test_indices_are_recomputed_in_training_only() -> None:
    layer = MaxPool(3, stride=2, ceil_mode=True)
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    assert layer(x).grad_fn.name() == "_MaxPoolBackward"
    assert layer.eval()(x).grad_fn.name() == "MaxPool2DWithIndicesBackward0"
    assert torch.equal(layer(x), layer.train()(x))


@pytest.mark.parametrize(
    ("block", "shape", "message"),
    [
        (PLAIN(3, 5, 3), (2, 4, 8, 8), r"ConvNormAct takes N x 3 x H x W, and got \[2, 4, 8, 8\]: reshape the batch"),
        (PLAIN(3, 5, 3), (2, 3, 8), r"ConvNormAct takes N x 3 x H x W, and got \[2, 3, 8\]"),
        (PLAIN(3, 5, 3), (2, 3, 8, 0), r"ConvNormAct takes maps of at least 1 x 1, and got \[2, 3, 8, 0\]: use larger"),
        (PLAIN(3, 5, 3, multiplier=2), (2, 4, 8, 8), "takes N x 3 x H x W"),
        (DENSE(3, 5), (2, 4), r"ConvNormAct takes N x 3, and got \[2, 4\]"),
        (DENSE(3, 5), (2, 1, 3), r"ConvNormAct takes N x 3, and got \[2, 1, 3\]"),
        (
            Inception(5, tables.Inception("x", 1, 2, 3, 2, 4, 1, "avg"), PLAIN),
            (1, 4, 8, 8),
            "Inception takes N x 5 x H",
        ),
        (BranchPool("max", 2), (2, 3), r"BranchPool takes N x C x H x W, and got \[2, 3\]"),
        (MaxPool(3, stride=2, ceil_mode=True), (1, 3, 1, 4), "MaxPool takes maps of at least 2 x 2"),
        (FlattenPixels(2), (2, 3, 4), "FlattenPixels takes N x C x H x W"),
        (GlobalPool(), (2, 3), "GlobalPool takes N x C x H x W"),
        (AuxiliaryHead(5, 3, PLAIN), (2, 4, 8, 8), r"conv \(ConvNormAct\) takes N x 5 x H x W"),
        (AuxiliaryHead(5, 3, PLAIN), (2, 5), r"pool \(HeadPool\) takes N x C x H x W"),
    ],
)
def test_inputs_of_other_shapes_are_refused(block: nn.Module, shape: tuple[int, ...], message: str) -> None:
    for kind in (ValueError, UsageError):
        with pytest.raises(kind, match=message):
            block(torch.zeros(shape))
