"""What the BN watch found, in rows, in numbers for a chart, and in sentences.

A layer crosses a rule of BN_CHECKS.md only by an effect that matters, over enough batches; see `GATES`.
"""

import statistics
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields

from bnlab.errors import plural


@dataclass(frozen=True, kw_only=True)
class Gates:
    """From where on a finding is worth a sentence."""

    mean_off: float = 0.1
    """BN102: a channel's running mean is off by so many standard deviations"""
    variance_off: float = 1.25
    """BN102: or its running variance by this factor"""
    effective_batch: float = 32.0
    """BN103: 95% sure to be fewer independent values than this"""
    off_share: float = 0.5
    """BN102: in more than this share of a layer's channels; some lag at a high learning rate is everyone's"""
    share: float = 0.05
    """BN109, BN110: in more than this share of a layer's channels"""
    batches: int = 8
    """BN102, BN103: seen in at least so many sampled batches"""


GATES = Gates()


@dataclass(frozen=True, kw_only=True)
class LayerHealth:
    """One normalisation layer over a window; None: not measured."""

    name: str
    channels: int
    trained: bool
    """whether gamma is"""
    momentum: float | None
    batches: int = 0
    """sampled steps; 0: its running statistics did not move, or no step was sampled"""
    initial: float = 0.0
    """what the initial statistics (0, 1) still weigh in the running ones"""
    mean_off: float | None = None
    """the worst channel's running mean from the batches', in standard deviations, beyond what is noise"""
    variance_off: float | None = None
    """the worst channel's ratio of running variance and batches', or its inverse, beyond what is noise: 1 is none"""
    off_share: float | None = None
    """channels beyond noise and BN102's gate, of all"""
    effective_batch: float | None = None
    """N_eff, pooled over channels: how many independent values the batch's statistics are worth"""
    effective_batch_at_most: float | None = None
    """upper end of its 95% interval"""
    dead: int
    """channels that the ReLU behind the layer all but never passes"""
    gamma_near_zero: int
    """channels whose |gamma| is below 1% of the layer's median"""


@dataclass(frozen=True, kw_only=True)
class Health:
    """All layers of a network, in its order; none without normalisation."""

    layers: tuple[LayerHealth, ...] = ()

    def table(self) -> tuple[list[str], list[list[object]]]:
        """Columns and rows, one a layer."""
        return [field.name for field in fields(LayerHealth)], [list(astuple(row)) for row in self.layers]

    def scalars(self) -> dict[str, float]:
        """Totals for charts; what was not measured is left out."""
        means = [row.mean_off for row in self.layers if row.mean_off is not None]
        variances = [row.variance_off for row in self.layers if row.variance_off is not None]
        off = [(row.off_share, row.channels) for row in self.layers if row.off_share is not None]
        sizes = [row.effective_batch for row in self.layers if row.effective_batch is not None]
        found: dict[str, float] = {}
        if off:
            found |= {"norm_mean_off_worst": max(means), "norm_mean_off_median": statistics.median(means)}
            found |= {
                "norm_variance_off_worst": max(variances),
                "norm_variance_off_median": statistics.median(variances),
            }
            found["norm_off_share"] = sum(share * n for share, n in off) / sum(n for _, n in off)
        if sizes:
            found["norm_effective_batch_smallest"] = min(sizes)
        if channels := sum(row.channels for row in self.layers):
            found["norm_dead_share"] = sum(row.dead for row in self.layers) / channels
            found["norm_gamma_near_zero_share"] = sum(row.gamma_near_zero for row in self.layers) / channels
        return found

    def warnings(self) -> list[str]:
        """A sentence for each rule that layers cross, with the likely cause and the recipe's keys to turn."""
        return [sentence for rule in (_stale, _small, _dead, _near_zero) if (sentence := rule(self.layers))]


Rows = tuple[LayerHealth, ...]


def _stale(rows: Rows) -> str:
    seen = [row for row in rows if row.off_share is not None and row.batches >= GATES.batches]
    crossing = [row for row in seen if (row.off_share or 0) > GATES.off_share]
    if not crossing:
        return ""
    worst = max(crossing, key=lambda row: row.off_share or 0)
    cause = (
        "the weights move faster than the statistics follow, which goes as the learning rate falls; if it lasts, lower "
        "learning_rate or raise norm_momentum"
    )
    if worst.initial > 0.01:
        cause = (
            f"they still hold {worst.initial:.0%} of the values they began with, for norm_momentum {worst.momentum:g} "
            "is small for so few steps: raise it"
        )
    return (
        f"BN102: the running statistics of {_of(crossing, rows)} are not those of the batches, so that evaluation sees "
        f"another network than training. Worst {worst.name}: {worst.off_share or 0:.0%} of its channels are off by "
        f"more than {GATES.mean_off:g} standard deviations or a variance of x{GATES.variance_off:g}, at most by "
        f"{worst.mean_off:.2g} and x{worst.variance_off:.3g}. Likely {cause}"
    )


def _small(rows: Rows) -> str:
    crossing = [
        row
        for row in rows
        if row.batches >= GATES.batches
        and row.effective_batch_at_most is not None
        and row.effective_batch_at_most < GATES.effective_batch
    ]
    if not crossing:
        return ""
    worst = min(crossing, key=lambda row: row.effective_batch or 0)
    return (
        f"BN103: a batch is worth fewer than {GATES.effective_batch:g} independent values to {_of(crossing, rows)}, so "
        f"that their statistics are noisy. Worst {worst.name}: {worst.effective_batch:.1f}, at most "
        f"{worst.effective_batch_at_most:.1f}, over {worst.batches} sampled batches. Likely the batches are small, or "
        "their images alike: raise batch_size, take norm=sync where several processes train, or with init "
        "freeze_bn=true"
    )


def _dead(rows: Rows) -> str:
    found = _channels(rows, lambda row: row.dead)
    return found and (
        f"BN109: dead channels, whose ReLU passes fewer than 1 value in 1,000, in {found}. Likely a step was too "
        "large: take learning_rate at a third, or a longer warmup; activation=leaky_relu keeps them alive"
    )


def _near_zero(rows: Rows) -> str:
    found = _channels(rows, lambda row: row.gamma_near_zero)
    return found and (
        f"BN110: channels with a gamma below 1% of their layer's median, which carry next to nothing, in {found}. "
        "Likely the network is wider than it needs to be, or learning_rate too high: a smaller width may do as well"
    )


def _channels(rows: Rows, count: Callable[[LayerHealth], int]) -> str:
    """The layers in training with too large a share of such channels, and the worst."""
    crossing = [row for row in rows if row.trained and count(row) > GATES.share * row.channels]
    if not crossing:
        return ""
    worst = max(crossing, key=lambda row: count(row) / row.channels)
    total = sum(count(row) for row in crossing)
    return f"{_of(crossing, rows)}, {total:,} in all. Worst {worst.name}: {count(worst)} of {worst.channels}"


def _of(crossing: list[LayerHealth], rows: Rows) -> str:
    return f"{len(crossing)} of {plural(len(rows), 'layer')}"
