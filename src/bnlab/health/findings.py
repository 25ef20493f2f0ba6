"""What the monitor measured: a row for each layer, totals for a chart, and findings.

A finding is reported only where the effect matters and enough was measured; see `Thresholds` and docs/checks.md.
"""

import statistics
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from bnlab.errors import plural
from bnlab.norm.recalibrate import MEAN_OFF, VARIANCE_OFF


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """From which values on the checks report; docs/checks.md explains them."""

    off_share: float = 0.5  # BN102: fraction of a layer's channels
    accuracy_lost: float = 0.01  # BN102: by the running statistics
    p_value: float = 0.01  # BN102
    initial: float = 0.01  # BN102: above this weight of the initial statistics, norm_momentum is the likely cause
    effective_batch: float = 32.0  # BN103: values, with 95% confidence
    batches: int = 8  # BN103: sampled at least
    channels: float = 0.05  # BN109, BN110: fraction of a layer's channels


THRESHOLDS = Thresholds()


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check reports. docs/checks.md has a section on each code."""

    code: str
    name: str
    """names the fault, as stale-statistics"""
    message: str
    """one line: what was measured, where, the likely cause and the remedy"""

    def __str__(self) -> str:
        return f"{self.code} {self.name}: {self.message} (docs/checks.md)"


@dataclass(frozen=True, kw_only=True)
class LayerHealth:
    """One normalisation layer over an epoch; None: not measured."""

    name: str
    channels: int
    trained: bool
    """whether gamma is trained"""
    momentum: float | None
    batches: int = 0
    """sampled steps; 0: its running statistics did not move, or no step was sampled"""
    initial: float = 0.0
    """weight of the initial statistics (0, 1) in the running ones"""
    mean_off: float | None = None
    """the largest distance of a channel's running mean from the population mean, in standard deviations"""
    variance_off: float | None = None
    """the largest ratio of a channel's running and population variance, or its inverse: 1 means equal"""
    off_share: float | None = None
    """fraction of channels that are off by more than 0.1 standard deviations or a variance factor of 1.25"""
    effective_batch: float | None = None
    """N_eff, pooled over channels: how many independent values the batch statistics are worth"""
    effective_batch_at_most: float | None = None
    """upper end of its 95% interval"""
    dead: int
    """channels of which the ReLU after the layer passes less than 0.1%"""
    gamma_near_zero: int
    """channels whose |gamma| is below 1% of the layer's median"""


@dataclass(frozen=True, kw_only=True)
class StatisticsCost:
    """Accuracy of the same network on the same photos by running and by population statistics, in 0..1."""

    photos: int
    running_top1: float
    population_top1: float
    p_value: float
    """exact McNemar test, two-sided: the probability of so large a difference if neither was better"""

    @classmethod
    def measure(cls, by_running: NDArray[np.bool_], by_population: NDArray[np.bool_]) -> "StatisticsCost":
        """From whether each photo was classified correctly."""
        from scipy.stats import binomtest

        better, worse = int((by_running & ~by_population).sum()), int((by_population & ~by_running).sum())
        return cls(
            photos=len(by_running),
            running_top1=float(by_running.mean()),
            population_top1=float(by_population.mean()),
            p_value=float(binomtest(worse, better + worse).pvalue) if better + worse else 1.0,
        )

    @property
    def matters(self) -> bool:
        """Whether the running statistics are worse by as much as the thresholds ask."""
        lost = self.population_top1 - self.running_top1
        return lost >= THRESHOLDS.accuracy_lost and self.p_value < THRESHOLDS.p_value


@dataclass(frozen=True, kw_only=True)
class Health:
    """All layers of a network, in its order; without normalisation it has none."""

    layers: tuple[LayerHealth, ...] = ()
    cost: StatisticsCost | None = None
    """None: this epoch was not validated by both statistics"""

    def table(self) -> tuple[list[str], list[list[object]]]:
        """Columns and rows, one row a layer."""
        return [field.name for field in fields(LayerHealth)], [list(astuple(row)) for row in self.layers]

    def scalars(self) -> dict[str, float]:
        """Totals for charts; what was not measured is left out."""
        found: dict[str, float] = {}
        for key in ("mean_off", "variance_off"):
            if values := [value for row in self.layers if (value := getattr(row, key)) is not None]:
                found |= {f"norm_{key}_worst": max(values), f"norm_{key}_median": statistics.median(values)}
        if off := [(row.off_share, row.channels) for row in self.layers if row.off_share is not None]:
            found["norm_off_share"] = sum(share * n for share, n in off) / sum(n for _, n in off)
        if sizes := [row.effective_batch for row in self.layers if row.effective_batch is not None]:
            found["norm_effective_batch_smallest"] = min(sizes)
        if channels := sum(row.channels for row in self.layers):
            found["norm_dead_share"] = sum(row.dead for row in self.layers) / channels
            found["norm_gamma_near_zero_share"] = sum(row.gamma_near_zero for row in self.layers) / channels
        return found

    def findings(self) -> list[Finding]:
        """One finding for each check that layers fail, with the likely cause and the recipe keys that change it."""
        checks = (_stale_statistics, _small_effective_batch, _dead_channels, _gamma_near_zero)
        return [finding for check in checks if (finding := check(self))]


def _stale_statistics(health: Health) -> Finding | None:
    failing = [row for row in health.layers if (row.off_share or 0) > THRESHOLDS.off_share]
    cost = health.cost
    if not failing or cost is None or not cost.matters:
        return None
    worst = max(failing, key=lambda row: row.off_share or 0)
    cause = "the statistics lag behind the weights: raise norm_momentum or lower learning_rate"
    if worst.initial > THRESHOLDS.initial:
        cause = (
            f"the initial statistics still weigh {worst.initial:.0%}, since norm_momentum {worst.momentum:g} is small "
            "for so few steps: raise norm_momentum"
        )
    return Finding(
        code="BN102",
        name="stale-statistics",
        message=(
            f"the running statistics of {_of(failing, health)} differ from the population statistics and cost "
            f"accuracy: {cost.running_top1:.1%} instead of {cost.population_top1:.1%} on {cost.photos:,} photos "
            f"(p = {cost.p_value:.1g}). Worst layer {worst.name}: {worst.off_share or 0:.0%} of its channels are off "
            f"by more than {MEAN_OFF:g} standard deviations or a variance factor of {VARIANCE_OFF:g} (at most "
            f"{worst.mean_off:.2g} and {worst.variance_off:.3g}). best.safetensors and last.safetensors hold the "
            f"population statistics and lose nothing. Likely {cause}"
        ),
    )


def _small_effective_batch(health: Health) -> Finding | None:
    failing = [
        row
        for row in health.layers
        if row.batches >= THRESHOLDS.batches
        and row.effective_batch_at_most is not None
        and row.effective_batch_at_most < THRESHOLDS.effective_batch
    ]
    if not failing:
        return None
    worst = min(failing, key=lambda row: row.effective_batch or 0)
    return Finding(
        code="BN103",
        name="small-effective-batch",
        message=(
            f"a batch is worth fewer than {THRESHOLDS.effective_batch:g} independent values in "
            f"{_of(failing, health)}, so the batch statistics are noisy. Worst layer {worst.name}: "
            f"{worst.effective_batch:.1f}, at most {worst.effective_batch_at_most:.1f}, over {worst.batches} sampled "
            "batches. Likely the batches are small or their photos are alike: raise batch_size, use norm=sync where "
            "several processes train, or freeze_bn=true with init"
        ),
    )


def _dead_channels(health: Health) -> Finding | None:
    where = _channels(health, lambda row: row.dead)
    if not where:
        return None
    return Finding(
        code="BN109",
        name="dead-channels",
        message=(
            f"the ReLU after the layer passes fewer than 1 in 1,000 values of some channels in {where}. Likely a step "
            "was too large: use a third of learning_rate, or a longer warmup; activation=leaky_relu keeps channels "
            "alive"
        ),
    )


def _gamma_near_zero(health: Health) -> Finding | None:
    where = _channels(health, lambda row: row.gamma_near_zero)
    if not where:
        return None
    return Finding(
        code="BN110",
        name="gamma-near-zero",
        message=(
            f"some channels carry almost nothing, since their gamma is below 1% of their layer's median, in {where}. "
            "Likely the network is wider than it needs to be, or learning_rate too high: try a smaller width"
        ),
    )


def _channels(health: Health, count: Callable[[LayerHealth], int]) -> str:
    """The trained layers with too many such channels, and the worst; empty if no layer has."""
    failing = [row for row in health.layers if row.trained and count(row) > THRESHOLDS.channels * row.channels]
    if not failing:
        return ""
    worst = max(failing, key=lambda row: count(row) / row.channels)
    total = sum(count(row) for row in failing)
    return f"{_of(failing, health)} ({total:,} in all; worst layer {worst.name}: {count(worst)} of {worst.channels})"


def _of(failing: list[LayerHealth], health: Health) -> str:
    return f"{len(failing)} of {plural(len(health.layers), 'layer')}"
