"""Modules that normalise and then do more: what is folded, what is left, and when neither is certain."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab.norm import BatchNorm2d
from bnlab.norm.folding.affine import Remainder, affine_of, operations, scales_with_parameters
from bnlab.norm.folding.fold import Folded, Folding, fold


class NormAct(nn.BatchNorm2d):
    """Normalisation, dropout and activation in one layer, written as timm writes it."""

    def __init__(self, channels: int, act: nn.Module | None = None) -> None:
        super().__init__(channels, eps=1e-3)
        self.drop, self.act = nn.Identity(), act or nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        training = self.training or (self.running_mean is None and self.running_var is None)
        mean = self.running_mean if not self.training or self.track_running_stats else None
        var = self.running_var if not self.training or self.track_running_stats else None
        x = F.batch_norm(x, mean, var, self.weight, self.bias, training, momentum, self.eps)
        return self.act(self.drop(x))


class SyncNormAct(nn.SyncBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return self.act(x) if hasattr(self, "act") else x


class OwnBase(BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sigmoid()


class Frozen(nn.Module):
    """Batch normalisation by constants, as detection networks have it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean"):
            self.register_buffer(name, torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            tensor.reshape(1, -1, 1, 1) for tensor in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (var + 1e-5).rsqrt()
        return F.gelu(x * scale + (bias - mean * scale))


class FrozenPlainly(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        by_channel = (None, slice(None), None, None)
        x = (x - self.running_mean[by_channel]) / (self.running_var[by_channel] + 1e-5).sqrt()
        return 1 - (x * self.weight[by_channel]).add(self.bias[:, None, None])


class ZeroCentred(nn.BatchNorm2d):
    """Its scale is 1 + weight, and what follows reads the bias again."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, weight=1 + self.weight, bias=self.bias, eps=self.eps)
        return y.relu() * self.bias.abs().sum()


class TwoArguments(nn.BatchNorm2d):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return super().forward(x)


class Branches(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[0] > 1 else super().forward(x) * 2


class Loops(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([super(Loops, self).forward(one[None]) for one in x])


class Noise(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, torch.rand_like(self.weight), self.bias)


class Constant(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, torch.rand(3).to(x), self.bias)


class MovesStatistics(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        self.running_mean.mul_(0.5)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class UsesInputAgain(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.sigmoid()


class Evo(nn.Module):
    """The variance is stored, but the input is also divided by a function of itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_var", torch.ones(channels))
        self.running_mean = torch.zeros(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.maximum(self.running_var.view(1, -1, 1, 1).sqrt(), x * 0.5 + x.std((2, 3), keepdim=True))


class SeveralStatistics(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)


def randomised(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.1, 2)
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
    return model.double().eval()


def folded(norm: nn.Module, **conv: Any) -> tuple[nn.Module, Folding, Tensor]:
    torch.manual_seed(0)
    model = randomised(nn.Sequential(nn.Conv2d(3, 3, 1, **conv), norm))
    return model, fold(model), torch.randn(2, 3, 4, 4, dtype=torch.float64)


def sync_with_activation() -> nn.Module:
    norm = SyncNormAct(3)
    norm.act = nn.SiLU()
    return norm


FOLDING: dict[str, Callable[[], nn.Module]] = {
    "normalisation and activation": lambda: NormAct(3),
    "synchronised": sync_with_activation,
    "frozen": lambda: Frozen(3),
    "frozen, in other operations": lambda: FrozenPlainly(3),
    "zero-centred": lambda: ZeroCentred(3),
}


@pytest.mark.parametrize("name", FOLDING)
@pytest.mark.parametrize("bias", [False, True])
def test_layers_that_do_more_keep_the_rest(name: str, bias: bool) -> None:
    model, folding, x = folded(FOLDING[name](), bias=bias)
    assert (folding.folded, folding.kept) == ({"1": ("0",)}, {})
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(folding.model(x), expected, rtol=1e-9, atol=1e-9)
    assert float(expected.std()) > 0.01
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folding.model.modules())
    with pytest.raises((ValueError, AssertionError), match=r"1 was folded into 0 for N x C x H x W|4D input"):
        folding.model(x[0])  # C x H x W, of which torch would take H as the channels


KEPT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "two arguments": (lambda: TwoArguments(3), "TwoArguments overrides forward, with 2 arguments"),
    "branches": (lambda: Branches(3), "Branches overrides forward, which branches on its input"),
    "loops": (
        lambda: Loops(3),
        "Loops overrides forward, which cannot be traced: Proxy object cannot be iterated",
    ),
    **{
        kind.__name__: (lambda kind=kind: kind(3), f"{kind.__name__} overrides forward, and its forward does not begin "
                        "with batch normalisation by stored statistics")
        for kind in (Noise, Constant, MovesStatistics, UsesInputAgain, Evo, SeveralStatistics)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_layers_that_do_something_else_are_kept(name: str) -> None:
    make, reason = KEPT[name]
    model, folding, x = folded(make())
    assert (folding.folded, folding.kept) == ({}, {"1": reason})
    torch.manual_seed(1)
    expected = copy.deepcopy(model)(x)
    torch.manual_seed(1)
    assert torch.equal(folding.model(x), expected)


def test_what_is_left_has_the_names_and_attributes_of_the_layer() -> None:
    _, folding, x = folded(NormAct(3, nn.Hardswish()))
    left = folding.model[1]
    assert isinstance(left, Remainder) and type(left.act) is nn.Hardswish and left.num_features == 3
    assert isinstance(left.batch_norm, Folded) and not list(left.parameters())
    buffer = io.BytesIO()
    torch.save(folding.model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(folding.model), pickle.loads(pickle.dumps(folding.model)),
              torch.load(buffer, weights_only=False)]  # fmt: skip
    for other in copies:
        assert torch.equal(other(x), folding.model(x)) and other[1].num_features == 3
    exported = torch.export.export(folding.model, (x,)).module()
    torch.testing.assert_close(exported(x), folding.model(x))


def test_the_operations_as_one_function() -> None:
    norm = randomised(nn.BatchNorm2d(3))
    plain, found = affine_of(norm), operations(norm, 4, 3)
    assert all(torch.equal(one, other) for one, other in zip(plain, found.affine, strict=True))
    frozen = FrozenPlainly(3).double()
    found = operations(frozen, 4, 3)
    assert found.output.target != found.input.target == "x"
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    scale, mean, beta = (value.view(3, 1, 1) for value in found.affine)
    torch.testing.assert_close((x - mean) * scale + beta, frozen(x))


# Layers before.


class Same(nn.Conv2d):
    """It pads the input so that the output has its size, divided by the stride."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.size()[-2:]
        pad_h = max((math.ceil(height / self.stride[0]) - 1) * self.stride[0] + self.weight.shape[2] - height, 0)
        pad_w = max((math.ceil(width / self.stride[1]) - 1) * self.stride[1] + self.weight.shape[3] - width, 0)
        x = F.pad(x, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


class WithoutBias(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight)


class ByItself(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x * self.weight.sum(), self.weight, self.bias)


class Sometimes(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[0] > 1 else 2 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "does"),
    [
        (nn.Conv2d(3, 3, 1), True),
        (nn.ConvTranspose2d(3, 3, 1), True),
        (Same(3, 3, 3), True),
        (Same(3, 3, 3, bias=False), True),
        (Standardised(3, 3, 1), False),
        (WithoutBias(3, 3, bias=False), False),
        (ByItself(3, 3, 1), False),
        (Sometimes(3, 3, 1), False),
        (nn.ReLU(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_which_layers_can_take_a_scale(layer: nn.Module, does: bool) -> None:
    state = list(layer.state_dict())
    assert scales_with_parameters(layer) == does
    assert list(layer.state_dict()) == state


@pytest.mark.parametrize("size", [8, 9, 11])
@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_that_pads_by_itself(size: int, bias: bool) -> None:
    torch.manual_seed(0)
    model = randomised(nn.Sequential(Same(3, 4, 3, stride=2, bias=bias), NormAct(4)))
    folding, x = fold(model), torch.randn(2, 3, size, size, dtype=torch.float64)
    assert folding.folded == {"1": ("0",)}
    with torch.no_grad():
        torch.testing.assert_close(folding.model(x), model(x), rtol=1e-9, atol=1e-9)
