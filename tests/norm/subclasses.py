"""Subclasses of batch normalisation layers as other libraries have them, and some that nobody can convert."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


class Derived(nn.BatchNorm2d):
    pass


class Activated(nn.BatchNorm2d):
    """Computes the arguments of batch_norm itself, then has dropout and an activation, as timm's BatchNormAct2d."""

    def __init__(self, *args: Any, drop: float = 0.0, **more: Any) -> None:
        super().__init__(*args, **more)
        self.drop, self.act = nn.Dropout(drop), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        tracked = not self.training or self.track_running_stats
        running = (self.running_mean, self.running_var) if tracked else (None, None)
        y = F.batch_norm(x, *running, self.weight, self.bias, by_batch, factor, self.eps)
        return self.act(self.drop(y))


class Doubled(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 3) * 2


class Direct(nn.BatchNorm2d):
    """Counts out of place, and calls torch's function."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked = self.num_batches_tracked + 1
        tracked = not self.training or self.track_running_stats
        running = (self.running_mean, self.running_var) if tracked else (None, None)
        by_batch = self.training or self.running_mean is None
        return torch.batch_norm(x, self.weight, self.bias, *running, by_batch, 0.1, self.eps, False) + 1


class Synchronised(nn.SyncBatchNorm):
    """As timm's SyncBatchNormAct."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sigmoid()


class AnyShape(_BatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        pass


class Twice(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(super().forward(input))


class Reads(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.running_mean.view(-1, 1, 1)


class Writes(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        self.running_var.clamp_(min=0.1)
        return y


class ByHand(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return input - input.mean((0, 2, 3), keepdim=True)


class Failing(nn.BatchNorm2d):
    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            raise TypeError("it takes a mask too")
        return super().forward(input) * mask


class AlwaysByBatch(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, None, None, self.weight, self.bias, training=True, eps=self.eps)


class AlwaysMoving(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        self.running_mean.add_(1)
        return y


class Foreign(nn.Module):
    """Keeps statistics, but derives from nothing that one could convert."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.running_mean.view(-1, 1, 1)


CONVERTIBLE = (nn.BatchNorm2d, nn.SyncBatchNorm, Derived, Activated, Doubled, Direct, Synchronised, AnyShape)
REASONS = {
    Twice: "the forward of Twice normalises by its batch 2 times, not once",
    Reads: "the forward of Reads also uses the statistics in another way",
    Writes: "the forward of Writes also uses the statistics in another way",
    ByHand: "the forward of ByHand normalises by its batch 0 times, not once",
    Failing: "the forward of Failing cannot be tried out: it takes a mask too",
    Foreign: "Foreign keeps statistics, but is not a subclass of torch.nn's layers",
}
