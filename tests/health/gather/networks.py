"""Odd networks that the tests of the trace have in common."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab.health.gather.layers import find_layers
from bnlab.health.gather.trace import Trace, trace


class Net(nn.Module):
    """Has the given modules, and runs a function of itself and the input."""

    def __init__(self, run: Callable[["Net", Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class BatchNormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d does it."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(self.drop(x))


class StdConv(nn.Conv2d):
    """Standardises its weights by batch_norm, as timm's StdConv2d does."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, padding=1)


class ScaledStdConv(nn.Conv2d):
    """As timm's ScaledStdConv2d; the weights are first computed of others, as a parametrisation would."""

    def forward(self, x: Tensor) -> Tensor:
        flat = (self.weight * 2 - torch.ones_like(self.weight)).double().reshape(1, self.out_channels, -1)
        gain = self.weight.new_full((self.out_channels,), 0.5).double()
        weight = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0)
        return F.conv2d(x, weight.to(x).reshape_as(self.weight), self.bias, padding=1)


class DropPath(nn.Module):
    """Returns its input in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


class FunctionalNorm(nn.Module):
    """Normalises by a function, with statistics where `keep` puts them."""

    def __init__(self, keep: str) -> None:
        super().__init__()
        statistics = {"mu": torch.zeros(3), "sigma": torch.ones(3)}
        for name, tensor in statistics.items():
            if keep == "buffer":
                self.register_buffer(name, tensor)
            elif keep == "domains":
                self.register_buffer(name, tensor.repeat(2, 1))
            elif keep == "parameter":
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                setattr(self, name, tensor)
        self.keep, self.domain = keep, 1

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mu, self.sigma
        if self.keep == "domains":
            mean, var = mean[torch.tensor([self.domain])][0], var[torch.tensor([self.domain])][0]
        return F.batch_norm(x, mean, var, training=self.training)


def traced(network: nn.Module, images: int = 4) -> Trace:
    x = torch.randn(images, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    network.eval()
    return trace(network, find_layers(network), lambda: network(x))
