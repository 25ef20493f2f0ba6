"""Measures each batch normalisation layer while the network trains, without hooks and without an extra pass.

The running statistics r tell the batch statistics b, since each step moves r to r' = (1 - m) r + m b:

    b = r + (r' - r) / m

for the means, and for the unbiased variances. So the buffers of all layers are copied before and after a few steps, as
one tensor, and the arithmetic is done once per window, in float64 on the CPU.

A window is `window` successive steps; one begins every `every` steps. Each window gives, for each channel, the variance
between batches of the batch mean, as half the mean squared successive difference (von Neumann 1941). Unlike the plain
variance, it does not grow with slow drift. The effective batch size (BN103) is N_eff = variance / variance between.

- m is the layer's momentum, or 1 / (1 + batches) where it is None. A layer that moves k times in a step (accumulation,
  two uses) moves by 1 - (1 - m)^k, towards a weighted mean of k batches; N_eff is that of one of them. Layers whose
  statistics do not move (frozen, a batch that is not finite) are not measured: their `batches` is 0.
- b is as exact as the rounding of r': about eps |r| / m. Channels where that is more than 0.01 standard deviations
  (half precision, a mean far from 0) are left out.
- Dead channels follow from gamma and beta by the normal distribution: P(BN > 0) = Phi(beta / |gamma|).

docs/checks has the known limits. Validation measures how far the statistics are from the population's (BN102).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.health.epoch import Health, LayerHealth
from bnlab.health.evidence import Scores
from bnlab.nets.blocks import ConvNormAct
from bnlab.norm.layers import batch_norm_layers
from bnlab.norm.norm_activation import NormActivation
from bnlab.norm.recalibrate import Recalibration

Floats = NDArray[np.float64]

_DEAD = -3.0902  # Phi(_DEAD) = 1e-3
_NEAR_ZERO = 1e-2  # of the layer's median |gamma|
_ROUNDING = 0.01  # standard deviations


class BNMonitor:
    """Measures the batch normalisation layers of a network while it trains; it reads, and changes nothing.

    Wrap each optimiser step (its forwards at least) in `step`, and call `report` at the end of an epoch. Which steps
    are sampled depends on their numbers alone, so that a resumed training samples the same; an epoch of fewer than
    `every` steps may have no sample.

    Raises:
        ValueError: a window of fewer than 2 steps, or longer than `every`.
    """

    def __init__(self, network: nn.Module, *, window: int = 8, every: int = 64) -> None:
        if not 2 <= window <= every:
            raise ValueError(f"window must be at least 2 steps and at most every={every}, not {window}")
        self.window, self.every = window, every
        self._all = dict(batch_norm_layers(network))
        self.rectified = set(_rectified(network))
        """the layers whose output goes straight into a ReLU"""
        kept = ("running_mean", "running_var", "num_batches_tracked")
        self._layers = {n: m for n, m in self._all.items() if all(m._buffers.get(key) is not None for key in kept)}
        self._sizes = np.array([layer.num_features for layer in self._layers.values()], dtype=np.int64)
        self._readings: list[tuple[Tensor, Tensor]] = []  # of a window: before its first step, and after each
        self._next_step: int | None = None  # of the window
        self._clear()

    def samples(self, step: int) -> bool:
        return bool(self._layers) and step % self.every < self.window

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Surrounds the step with this number."""
        if self.samples(step) and self._next_step != step:
            self._readings, self._next_step = [self._read()], step
        yield
        if self._next_step == step:
            self._readings.append(self._read())
            self._next_step += 1
            if step % self.every == self.window - 1:
                self._close()

    def report(self, recalibration: Recalibration | None = None, scores: Scores | None = None) -> Health:
        """What was measured since the last report; a new window begins.

        `recalibration` is what this epoch's validation measured, and `scores` whether it
        classified each photo correctly by the running statistics and by the recalibrated ones.
        """
        self._close()
        sampled = dict(zip(self._layers, self._sampled(), strict=True))
        recalibrated = recalibration.layers if recalibration else {}
        rows = []
        for name, layer in self._all.items():
            fields = sampled.get(name, {}) | _affine(layer, rectified=layer in self.rectified)
            if found := recalibrated.get(name):
                fields |= {"mean_off": found.mean_off, "variance_off": found.variance_off, "off_share": found.off_share}
            rows.append(
                LayerHealth(
                    name=name,
                    channels=layer.num_features,
                    trained=layer.affine and layer.weight.requires_grad,
                    momentum=layer.momentum,
                    **fields,
                )
            )
        self._clear()
        return Health(layers=tuple(rows), scores=scores)

    def _clear(self) -> None:
        self._batches = np.zeros(len(self._sizes), np.int64)
        self._ratios = np.zeros((3, len(self._sizes)))  # number, sum and sum of squares of 1 / N_eff, by pair of steps

    def _read(self) -> tuple[Tensor, Tensor]:
        """All layers' running means, then their variances, 2C; and the batches that each has counted, L."""
        # From the dictionaries: nn.Module's attributes take ten times as long.
        buffers = cast(list[dict[str, Tensor]], [layer._buffers for layer in self._layers.values()])
        device = buffers[0]["running_mean"].device  # a model may lie on several
        statistics = torch.cat([b[key].to(device) for key in ("running_mean", "running_var") for b in buffers])
        return statistics, torch.stack([b["num_batches_tracked"].to(device) for b in buffers])

    @np.errstate(all="ignore")  # layers that did not move become NaN, and are left out
    def _close(self) -> None:
        """Add the window to the sums, if it has a pair of steps."""
        readings, self._readings, self._next_step = self._readings, [], None
        if len(readings) < 3:
            return
        rounding = torch.finfo(readings[0][0].dtype).eps
        statistics = torch.stack([reading for reading, _ in readings]).cpu().double().numpy()  # (K + 1) x 2C
        counts = torch.stack([count for _, count in readings]).cpu().numpy()  # (K + 1) x L
        rate, weight = self._rates(np.diff(counts, axis=0), counts[1:])  # K x L, K x L
        means, variances = np.split(recover(statistics, rate, self._sizes), 2, axis=1)  # K x C each
        eps = np.repeat([layer.eps for layer in self._layers.values()], self._sizes)  # C
        variance = variances.clip(min=0).mean(0)  # C
        old_mean = np.split(statistics[0], 2)[0]  # C
        error = rounding * np.abs(old_mean) / np.repeat(rate.mean(0), self._sizes)  # C
        exact = error < _ROUNDING * np.sqrt(variance + eps)  # False for NaN
        between = np.diff(means, axis=0) ** 2 / 2  # K-1 x C
        per_batch = between / np.repeat(weight.mean(0), self._sizes)  # K-1 x C
        live = exact & (variance > eps)  # where eps is larger, it normalises rather than the batch
        ratio = self._by_layer(np.where(live, per_batch / (variance + per_batch.mean(0)), 0))  # K-1 x L
        live_channels = self._by_layer(live)  # L
        ratio = ratio / live_channels.clip(min=1)
        sums = np.stack([np.full(len(self._sizes), len(ratio)), ratio.sum(0), (ratio**2).sum(0)])  # 3 x L
        self._ratios += np.where(live_channels > 0, sums, 0)
        moved = np.isfinite(rate).all(0) & np.isfinite(self._by_layer(means.sum(0)))  # L
        self._batches += np.where(moved, len(means), 0)

    def _rates(self, moves: NDArray[Any], counts: NDArray[Any]) -> tuple[Floats, Floats]:
        """How far each step moved each layer (NaN: not at all), and its batches' summed squared weights: both K x L."""
        m = np.array([layer.momentum for layer in self._layers.values()], dtype=np.float64)  # NaN for None
        average = np.isnan(m)  # a plain average, of which the first batch weighs all
        m = np.nan_to_num(m, nan=1.0)
        rate = np.where(average, moves / counts, 1 - (1 - m) ** moves)
        rate = np.where(rate > 0, rate, np.nan)
        return rate, np.where(average, 1 / moves, m * (2 - rate) / ((2 - m) * rate))

    def _by_layer(self, channels: NDArray[Any]) -> Floats:
        """Sums of ... x C over each layer's channels: ... x L."""
        starts = np.concatenate([[0], np.cumsum(self._sizes)[:-1]])
        return cast(Floats, np.add.reduceat(channels.astype(np.float64), starts, axis=-1))

    def _sampled(self) -> Iterator[dict[str, Any]]:
        """The fields of each layer's row that the windows give."""
        columns = zip(self._layers.values(), self._batches, self._ratios.T, strict=True)
        for layer, batches, (pairs, total, squares) in columns:
            fields: dict[str, Any] = {"batches": int(batches)}
            if batches:
                assert layer.num_batches_tracked is not None
                kept = 0.0 if layer.momentum is None else 1 - layer.momentum  # of the old statistics, by each batch
                fields["updates"] = int(layer.num_batches_tracked)
                fields["initial"] = kept ** fields["updates"]
            if pairs > 1 and total > 0:
                ratio = total / pairs
                # 1.5: neighbouring differences share a batch, and their squares correlate by 1/4
                error = math.sqrt(1.5 * max(0.0, squares / pairs - ratio**2) / (pairs - 1))
                least = ratio - 2 * error
                at_most = float(1 / least) if least > 0 else math.inf
                fields |= {"effective_batch": float(1 / ratio), "effective_batch_at_most": at_most}
            yield fields


def recover(statistics: Floats, rate: Floats, sizes: NDArray[np.int64]) -> Floats:
    """The batches' statistics, K x 2C, from the running ones, (K + 1) x 2C, which each moved by `rate`, K x L."""
    return statistics[:-1] + np.diff(statistics, axis=0) / np.tile(np.repeat(rate, sizes, axis=1), 2)  # K x 2C


def _affine(layer: _BatchNorm, *, rectified: bool) -> dict[str, Any]:
    """The fields that gamma and beta give: a channel is dead if the ReLU after the layer would never pass it."""
    if not layer.affine:
        return {"dead": 0, "gamma_near_zero": 0}
    gamma = layer.weight.detach().cpu().double().abs()  # C
    beta = torch.zeros_like(gamma) if layer.bias is None else layer.bias.detach().cpu().double()  # C
    dead = int((beta <= _DEAD * gamma).sum()) if rectified else 0
    return {"dead": dead, "gamma_near_zero": int((gamma < _NEAR_ZERO * gamma.median()).sum())}


def _rectified(network: nn.Module) -> Iterator[nn.Module]:
    """Those of bnlab's blocks, and those of a Sequential."""
    for module in network.modules():
        pairs: list[tuple[nn.Module, nn.Module]] = []
        if isinstance(module, ConvNormAct | NormActivation):
            norm = module.bn if isinstance(module, ConvNormAct) else module.norm
            pairs = [(norm, module.activation)] * (module.placement == "before")
        elif isinstance(module, nn.Sequential):
            pairs = list(pairwise(module))
        yield from (first for first, second in pairs if isinstance(second, nn.ReLU))
