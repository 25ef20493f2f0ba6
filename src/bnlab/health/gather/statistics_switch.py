"""Chooses by which statistics the layers of a network normalise."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from bnlab.norm.ghost import GhostBatchNorm
from bnlab.norm.layers import BatchNorm, StatisticsMode
from bnlab.norm.moments import Moments
from bnlab.norm.whitening import Whitening

Which = Literal["running", "batch", "population"]
_BatchNormBase = nn.modules.batchnorm._BatchNorm


class StatisticsSwitch:
    """Chooses what the layers of a network normalise by. Used within `restored`, which undoes it."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers
        self.buffers = {name: dict(layer._buffers) for name, layer in layers.items()}
        self.replaces = {name for name, layer in layers.items() if _normalises_by_moments(layer)}
        self.modes = {name: layer._statistics for name, layer in layers.items() if isinstance(layer, StatisticsMode)}
        self.which: Which = "running"

    def to(self, which: Which, population: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> None:
        """By the running statistics, by those of each batch, or by the given ones where a layer has some."""
        self.which = which
        for name, layer in self.layers.items():
            layer._buffers.update(self.buffers[name])
            if isinstance(layer, StatisticsMode):
                by_batch = which == "batch" and name not in self.replaces
                own = self.modes[name] if which == "running" and self.modes[name] == "batch" else "running"
                layer._statistics = "batch" if by_batch else own
            elif isinstance(layer, _InstanceNorm):
                layer.track_running_stats = which != "batch" and self.buffers[name].get("running_mean") is not None
                if which == "batch":  # of each image by itself, as in training
                    layer._buffers.update(running_mean=None, running_var=None)
            elif which == "batch" and name not in self.replaces and isinstance(layer, _BatchNormBase):
                layer._buffers.update(running_mean=None, running_var=None)
            if which == "population" and population is not None and name in population:
                mean, variance = population[name]
                key = "running_covariance" if isinstance(layer, Whitening) else "running_var"
                layer._buffers.update({"running_mean": mean, key: variance})

    def replace(self, name: str, batch: Moments) -> None:
        """Let a layer normalise by what was measured of its input, which it need not compute again."""
        like = self.buffers[name]["running_mean"]
        assert like is not None
        mean, variance = batch.mean.to(like), batch.variance(unbiased=False).to(like)
        self.layers[name]._buffers.update(running_mean=mean, running_var=variance)


def _normalises_by_moments(layer: nn.Module) -> bool:
    """Whether the layer normalises by one mean and one variance of each channel, which its buffers can hold."""
    mean = layer._buffers.get("running_mean")
    if mean is None or mean.dtype not in (torch.float32, torch.float64):
        return False
    if isinstance(layer, _InstanceNorm | Whitening | GhostBatchNorm):
        return False
    return not (isinstance(layer, BatchNorm) and layer.example_weight)
