"""The BN watch: how each normalisation layer fares during training, for almost nothing.

There are no hooks and no extra pass: the running statistics tell what the batch was. r' = (1 - m) r + m b gives

    b = r + (r' - r) / m

of the means, and of the variances (the unbiased ones, which are what r holds). So the buffers of all layers are copied
before and after a few steps, as one tensor, and all the arithmetic is done once a run, in float64 on the CPU.

Sampled are runs of `window` successive steps, one every `every` steps. Of each channel of each run are found
- the gap (BN102): the mean of b over the run against the r it began with, which none of these batches moved;
- the variance between batches of the batch mean, as half the mean squared successive difference (von Neumann 1941),
  which does not see slow drift as the plain variance would; from it N_eff = var / variance between (BN103).

What to know of the numbers:
- m is the layer's momentum, 1 / (1 + batches) where it is None. Layers that do not move (frozen, momentum 0,
  population statistics, a batch that was not finite), or keep no statistics, are not measured: `batches` is 0.
- A layer moved k times a step (accumulation, two uses) moves by 1 - (1 - m)^k, towards a weighted mean of k batches.
  N_eff is that of one of them. (Recomputation moves twice by the same batch: N_eff is then up to 2 times too low.)
- Ghost batches move the statistics once, by the whole batch, so N_eff is the whole batch's. Synchronised layers: that
  of all processes. Whitening layers are not watched.
- b is as exact as the rounding of r': about eps |r| / m. Where that is more than 0.01 sigma (half precision, a mean
  far from 0) the channel is left out.
- Weights move between batches. What successive differences do not cancel of it makes N_eff too low: a lower bound.
- The running statistics lag behind moving weights by about 1 / m steps, so gaps are largest at the height of the
  learning rate, and fall with it.
- Gaps are not judged in warm-up, while the initial (0, 1) weighs over 1%, for 100 batches at the most. Their expected
  noise, s2 (m / (2 - m) + 1 / K) for K batches, is subtracted from their mean square over the runs.
- Dead channels follow from gamma and beta, by the normal distribution: P(BN > 0) = Phi(beta / |gamma|).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.health.findings import GATES, Health, LayerHealth
from bnlab.nets.blocks import ConvNormAct
from bnlab.norm.layers import batch_norm_layers
from bnlab.norm.norm_activation import NormActivation

Floats = NDArray[np.float64]

_DEAD = -3.0902  # Phi of it is 1e-3
_NEAR_ZERO = 1e-2  # of the layer's median |gamma|
_ROUNDING = 0.01  # sigma
_WARM_UP = 100  # batches; at a momentum that needs more, the statistics are not warming up but stale


@dataclass
class _Run:
    """Successive steps: the state before the first of them, and after each."""

    next: int
    momentum: Floats  # L; 1 for a plain average, of which the first batch weighs all
    average: NDArray[np.bool_]  # L
    statistics: list[Tensor] = field(default_factory=list)  # each 2C: all layers' means, then their variances
    counts: list[Tensor] = field(default_factory=list)  # each L


class BNMonitor:
    """Measures the batch normalisation layers of a network while it trains; it reads, and changes nothing.

    Call `before` and `after` around each optimiser step (its forwards at least), with its number, and `report` at an
    epoch's end. Which steps are sampled depends on their numbers alone, so that a resumed training watches alike; an
    epoch of fewer than `every` steps may have none.

    Raises:
        ValueError: a window of fewer than 2 steps, or longer than `every`.
    """

    def __init__(self, network: nn.Module, *, window: int = 8, every: int = 64) -> None:
        if not 2 <= window <= every:
            raise ValueError(f"window is 2 steps or more, and at most every={every}, not {window}")
        self.window, self.every = window, every
        self._all = dict(batch_norm_layers(network))
        self._rectified = set(_rectified(network))
        kept = ("running_mean", "running_var", "num_batches_tracked")
        self._layers = {n: m for n, m in self._all.items() if all(m._buffers.get(key) is not None for key in kept)}
        self._sizes = np.array([layer.num_features for layer in self._layers.values()], dtype=np.int64)
        self._run: _Run | None = None
        self._clear()

    def samples(self, step: int) -> bool:
        """Whether this step is sampled."""
        return bool(self._layers) and step % self.every < self.window

    def before(self, step: int) -> None:
        """The step is about to begin."""
        if self.samples(step) and (self._run is None or self._run.next != step):
            m = np.array([layer.momentum for layer in self._layers.values()], dtype=np.float64)  # NaN for None
            self._run = _Run(step, np.nan_to_num(m, nan=1.0), np.isnan(m))
            self._read(self._run)

    def after(self, step: int) -> None:
        """The step, its forward at least, is done."""
        run = self._run
        if run is None or run.next != step:
            return
        self._read(run)
        run.next += 1
        if step % self.every == self.window - 1:
            self._close()

    @contextmanager
    def watched(self, step: int) -> Iterator[None]:
        """`before` and `after` around a step."""
        self.before(step)
        yield
        self.after(step)

    def report(self) -> Health:
        """What was found since the last report; a new window begins."""
        self._close()
        found = dict(zip(self._layers, self._measured(), strict=True)) if self._layers else {}
        rows = []
        for name, layer in self._all.items():
            dead, near_zero = _affine(layer)
            rows.append(
                LayerHealth(
                    name=name,
                    channels=layer.num_features,
                    trained=layer.affine and layer.weight.requires_grad,
                    momentum=layer.momentum,
                    dead=dead if layer in self._rectified else 0,
                    gamma_near_zero=near_zero,
                    **found.get(name, {}),
                )
            )
        self._clear()
        return Health(layers=tuple(rows))

    def _clear(self) -> None:
        layers, channels = len(self._sizes), int(self._sizes.sum())
        self._batches, self._runs = np.zeros(layers, np.int64), np.zeros(layers)
        self._initial = np.zeros(layers)  # what the initial (0, 1) weighed last
        self._ratios = np.zeros((3, layers))  # of 1 / N_eff, one value a pair of steps: how many, sum, sum of squares
        self._gaps, self._noise = np.zeros((2, channels)), np.zeros((2, channels))  # sums of squares over runs

    def _read(self, run: _Run) -> None:
        # From the dictionaries: nn.Module's attributes take ten times as long.
        buffers = cast(list[dict[str, Tensor]], [layer._buffers for layer in self._layers.values()])
        run.statistics.append(torch.cat([b[key] for key in ("running_mean", "running_var") for b in buffers]))
        run.counts.append(torch.stack([b["num_batches_tracked"] for b in buffers]))

    def _close(self) -> None:
        """Take a run into the sums, if it has a pair of steps."""
        run, self._run = self._run, None
        if run is None or len(run.counts) < 3:
            return
        with np.errstate(all="ignore"):  # layers that did not move become NaN, and are left out
            self._take(run, torch.stack(run.statistics).cpu().double().numpy(), torch.stack(run.counts).cpu().numpy())

    def _take(self, run: _Run, statistics: Floats, counts: NDArray[np.int64]) -> None:
        """`statistics` is (K + 1) x 2C, `counts` (K + 1) x L."""
        rate, weight = _rates(run, np.diff(counts, axis=0), counts[1:])  # K x L, K x L
        means, variances = np.split(recover(statistics, rate, self._sizes), 2, axis=1)  # K x C each
        variances, steps = variances.clip(min=0), len(means)
        eps = np.repeat([layer.eps for layer in self._layers.values()], self._sizes)  # C
        variance = variances.mean(0)
        sigma = np.sqrt(variance + eps)
        between = np.stack([np.diff(means, axis=0) ** 2, np.diff(variances, axis=0) ** 2]) / 2  # 2 x K-1 x C
        old_mean, old_variance = np.split(statistics[0], 2)  # C each
        rate_of = np.repeat(rate.mean(0), self._sizes)  # C
        rounding = torch.finfo(run.statistics[0].dtype).eps * np.abs(old_mean) / rate_of  # C
        exact = rounding < _ROUNDING * sigma  # False for NaN
        per_batch = between[0] / np.repeat(weight.mean(0), self._sizes)  # K-1 x C
        live = exact & (variance > eps)  # what eps rules is not normalised by the batch
        share = np.where(live, per_batch / (variance + per_batch.mean(0)), 0)  # K-1 x C
        live_channels = self._by_layer(live)
        share = self._by_layer(share) / live_channels.clip(min=1)  # K-1 x L
        sums = np.stack([np.full(len(self._sizes), steps - 1), share.sum(0), (share**2).sum(0)])  # 3 x L
        self._ratios += np.where(live_channels > 0, sums, 0)
        moved = np.isfinite(rate).all(0) & np.isfinite(self._by_layer(means.sum(0)))  # L
        self._batches += np.where(moved, steps, 0)
        self._initial = np.where(moved, (1 - run.momentum) ** counts[0], self._initial)
        settled = moved & ((self._initial <= 0.01) | (counts[0] >= _WARM_UP))
        self._runs += settled
        judged = np.repeat(settled, self._sizes) & exact
        gaps = np.stack(
            [(means.mean(0) - old_mean) / sigma, np.log(sigma**2 / (old_variance.clip(min=0) + eps))]
        )  # 2 x C
        noise = between.mean(1) / np.stack([sigma**2, sigma**4]) * (rate_of / (2 - rate_of) + 1 / steps)  # 2 x C
        self._gaps += np.where(judged, gaps**2, 0)
        self._noise += np.where(judged, noise, 0)

    def _by_layer(self, channels: NDArray[Any]) -> Floats:
        """Sums of ... x C over each layer's channels: ... x L."""
        starts = np.concatenate([[0], np.cumsum(self._sizes)[:-1]])
        return cast(Floats, np.add.reduceat(channels.astype(np.float64), starts, axis=-1))

    def _measured(self) -> Iterator[dict[str, Any]]:
        """The fields of each layer's row that the runs give."""
        from scipy.stats import f

        for i, (low, high) in enumerate(pairwise([0, *np.cumsum(self._sizes)])):
            fields: dict[str, Any] = {"batches": int(self._batches[i]), "initial": float(self._initial[i])}
            if runs := self._runs[i]:
                gaps, noise = self._gaps[:, low:high] / runs, self._noise[:, low:high] / runs  # 2 x channels
                # Noise of so few batches is itself an estimate: 2/3 of a degree of freedom a pair (von Neumann).
                sure = gaps > noise * f.ppf(0.999, runs, max(1, 2 / 3 * (self._batches[i] - runs)))
                off = np.sqrt(np.where(sure, gaps - noise, 0).clip(min=0))
                fields |= {"mean_off": float(off[0].max()), "variance_off": math.exp(off[1].max())}
                gates = np.array([[GATES.mean_off], [math.log(GATES.variance_off)]])
                fields["off_share"] = float((off > gates).any(0).mean())
            pairs, total, squares = self._ratios[:, i]
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


def _rates(run: _Run, moves: NDArray[Any], counts: NDArray[Any]) -> tuple[Floats, Floats]:
    """How far each step moved each layer (NaN: not at all), and its batches' summed squared weights: both K x L."""
    m, average = run.momentum, run.average
    rate = np.where(average, moves / counts, 1 - (1 - m) ** moves)
    rate = np.where(rate > 0, rate, np.nan)
    return rate, np.where(average, 1 / moves, m * (2 - rate) / ((2 - m) * rate))


def _affine(layer: _BatchNorm) -> tuple[int, int]:
    """How many channels a ReLU behind it would never pass, and how many have a gamma near 0."""
    if not layer.affine:
        return 0, 0
    gamma = layer.weight.detach().cpu().double().abs()  # C
    beta = torch.zeros_like(gamma) if layer.bias is None else layer.bias.detach().cpu().double()  # C
    return int((beta <= _DEAD * gamma).sum()), int((gamma < _NEAR_ZERO * gamma.median()).sum())


def _rectified(network: nn.Module) -> Iterator[nn.Module]:
    """The layers whose output goes straight into a ReLU."""
    for module in network.modules():
        pairs: list[tuple[nn.Module, nn.Module]] = []
        if isinstance(module, ConvNormAct | NormActivation):
            norm = module.bn if isinstance(module, ConvNormAct) else module.norm
            pairs = [(norm, module.activation)] * (module.placement == "before")
        elif isinstance(module, nn.Sequential):
            pairs = list(pairwise(module))
        yield from (first for first, second in pairs if isinstance(second, nn.ReLU))
