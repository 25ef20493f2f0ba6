"""What the monitor measured: a row for each layer, totals for a chart, and findings.

A finding is reported only where the effect matters and enough was measured; docs/checks.md has the thresholds.
"""

import math
import statistics
from dataclasses import astuple, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from bnlab.errors import plural
from bnlab.norm.recalibrate import MEAN_OFF, VARIANCE_OFF

# From which values on the checks report; docs/checks.md explains them.
_OFF_SHARE = 0.5  # BN102: fraction of a layer's channels
_ACCURACY_LOST = 0.01  # BN102: by the running statistics
_P_VALUE = 0.01  # BN102
_INITIAL = 0.01  # BN102: above this weight of the initial statistics, norm_momentum is the likely cause
_EFFECTIVE_BATCH = 32  # BN103: values, with 95% confidence
_BATCHES = 8  # BN103: sampled at least
_CHANNELS = 0.05  # BN109, BN110: fraction of a layer's channels


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check reports. docs/checks.md has a section on each code."""

    code: str
    name: str  # names the fault, as stale-statistics
    message: str  # one line: what was measured, where, the likely cause and the remedy

    def __str__(self) -> str:
        return f"{self.code} {self.name}: {self.message} (docs/checks.md)"


@dataclass(frozen=True, kw_only=True)
class LayerHealth:
    """One normalisation layer over an epoch; None: not measured."""

    name: str
    channels: int
    trained: bool  # whether gamma is trained
    momentum: float | None
    batches: int = 0  # sampled steps; 0: its running statistics did not move, or no step was sampled
    initial: float = 0.0  # weight of the initial statistics (0, 1) in the running ones
    mean_off: float | None = None
    """the largest distance of a channel's running mean from the population mean, in standard deviations"""
    variance_off: float | None = None
    """the largest ratio of a channel's running and population variance, or its inverse: 1 means equal"""
    off_share: float | None = None
    """fraction of channels that are off by more than 0.1 standard deviations or a variance factor of 1.25"""
    effective_batch: float | None = None
    """N_eff, pooled over channels: how many independent values the batch statistics are worth"""
    effective_batch_at_most: float | None = None  # upper end of its 95% interval
    dead: int  # channels of which the ReLU after the layer passes less than 0.1%
    gamma_near_zero: int  # channels whose |gamma| is below 1% of the layer's median


@dataclass(frozen=True, kw_only=True)
class StatisticsCost:
    """Accuracy of the same network on the same photos by running and by population statistics, in 0..1."""

    photos: int
    running_top1: float
    population_top1: float
    p_value: float  # exact McNemar test, two-sided: the probability of so large a difference if neither was better

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
        return lost >= _ACCURACY_LOST and self.p_value < _P_VALUE


@dataclass(frozen=True, kw_only=True)
class Health:
    """All layers of a network, in its order; without normalisation it has none."""

    layers: tuple[LayerHealth, ...] = ()
    cost: StatisticsCost | None = None  # None: this epoch was not validated by both statistics

    def table(self) -> tuple[list[str], list[list[object]]]:
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
        messages = (
            ("BN102", "stale-statistics", _stale_statistics(self)),
            ("BN103", "small-effective-batch", _small_effective_batch(self)),
            ("BN109", "dead-channels", _many_channels(self, "dead", _DEAD_CHANNELS)),
            ("BN110", "gamma-near-zero", _many_channels(self, "gamma_near_zero", _GAMMA_NEAR_ZERO)),
        )
        return [Finding(code=code, name=name, message=message) for code, name, message in messages if message]


# Each check returns the message of its finding, or nothing.


def _stale_statistics(health: Health) -> str:
    failing = [row for row in health.layers if (row.off_share or 0) > _OFF_SHARE]
    cost = health.cost
    if not failing or cost is None or not cost.matters:
        return ""
    worst = max(failing, key=lambda row: row.off_share or 0)
    cause = "the statistics lag behind the weights: raise norm_momentum or lower learning_rate"
    if worst.initial > _INITIAL:
        cause = (
            f"the initial statistics still weigh {worst.initial:.0%}, since norm_momentum {worst.momentum:g} is small "
            "for so few steps: raise norm_momentum"
        )
    return (
        f"the running statistics of {_of(failing, health)} differ from the population statistics and cost "
        f"accuracy: {cost.running_top1:.1%} instead of {cost.population_top1:.1%} on {cost.photos:,} photos "
        f"(p = {cost.p_value:.1g}). Worst layer {worst.name}: {worst.off_share or 0:.0%} of its channels are off "
        f"by more than {MEAN_OFF:g} standard deviations or a variance factor of {VARIANCE_OFF:g} (at most "
        f"{worst.mean_off:.2g} and {worst.variance_off:.3g}). best.safetensors and last.safetensors hold the "
        f"population statistics and lose nothing. Likely {cause}"
    )


def _small_effective_batch(health: Health) -> str:
    sampled = [row for row in health.layers if row.batches >= _BATCHES]
    failing = [row for row in sampled if (row.effective_batch_at_most or math.inf) < _EFFECTIVE_BATCH]
    if not failing:
        return ""
    worst = min(failing, key=lambda row: row.effective_batch or 0)
    return (
        f"a batch is worth fewer than {_EFFECTIVE_BATCH} independent values in {_of(failing, health)}, so the batch "
        f"statistics are noisy. Worst layer {worst.name}: {worst.effective_batch:.1f}, at most "
        f"{worst.effective_batch_at_most:.1f}, over {worst.batches} sampled batches. Likely the batches are small or "
        "their photos are alike: raise batch_size, use norm=sync where several processes train, or freeze_bn=true "
        "with init"
    )


_DEAD_CHANNELS = (
    "the ReLU after the layer passes fewer than 1 in 1,000 values of some channels in {}. Likely a step was too large: "
    "use a third of learning_rate, or a longer warmup; activation=leaky_relu keeps channels alive"
)
_GAMMA_NEAR_ZERO = (
    "some channels carry almost nothing, since their gamma is below 1% of their layer's median, in {}. Likely the "
    "network is wider than it needs to be, or learning_rate too high: try a smaller width"
)


def _many_channels(health: Health, field: str, message: str) -> str:
    """The message with the trained layers that have too many channels counted in this field, and the worst of them."""
    counts = {row.name: getattr(row, field) for row in health.layers}
    failing = [row for row in health.layers if row.trained and counts[row.name] > _CHANNELS * row.channels]
    if not failing:
        return ""
    worst = max(failing, key=lambda row: counts[row.name] / row.channels)
    total = sum(counts[row.name] for row in failing)
    of_worst = f"worst layer {worst.name}: {counts[worst.name]} of {worst.channels}"
    return message.format(f"{_of(failing, health)} ({total:,} in all; {of_worst})")


def _of(failing: list[LayerHealth], health: Health) -> str:
    return f"{len(failing)} of {plural(len(health.layers), 'layer')}"
