"""What the monitor of a training measured in an epoch: a row for each layer, totals for a chart, and findings.

The findings are those of the doctor's checks BN102, BN103, BN109 and BN110, which read this evidence as they read a
diagnosis; docs/checks explains them.
"""

import statistics
from dataclasses import dataclass, fields

from bnlab.health.check import Finding
from bnlab.health.evidence import Evidence, LayerEvidence, Scores
from bnlab.health.registry import chosen, run_checks

CHECKS = ("BN102", "BN103", "BN109", "BN110")
_LAYER_TAGS = ("mean_off", "variance_off", "effective_batch", "dead", "gamma_near_zero")


@dataclass(frozen=True, kw_only=True)
class LayerHealth:
    """One normalisation layer over an epoch; None: not measured."""

    name: str
    channels: int
    trained: bool  # whether gamma is trained
    momentum: float | None
    batches: int = 0  # sampled steps; 0: its running statistics did not move, or no step was sampled
    updates: int | None = None  # batches that the running statistics have counted; not in health.csv
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
class Health:
    """All layers of a network, in its order; without normalisation it has none."""

    layers: tuple[LayerHealth, ...] = ()
    scores: Scores | None = None  # None: this epoch was not validated by both statistics

    def table(self) -> tuple[list[str], list[list[object]]]:
        columns = [field.name for field in fields(LayerHealth) if field.name != "updates"]
        return columns, [[getattr(row, column) for column in columns] for row in self.layers]

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

    def tags(self) -> dict[str, float]:
        """The totals and the numbers of each layer by their tags in TensorBoard; what was not measured is left out."""
        values: dict[str, float | None] = {key.replace("_", "/", 1): value for key, value in self.scalars().items()}
        for layer in self.layers:
            values |= {f"norm_{key}/{layer.name}": getattr(layer, key) for key in _LAYER_TAGS}
        return {tag: value for tag, value in values.items() if value is not None}

    def findings(self) -> list[Finding]:
        """One finding for each check that layers fail, in the order of their ids."""
        layers = {row.name: _evidence_of(row) for row in self.layers}
        images = 0 if self.scores is None or self.scores.running is None else len(self.scores.running)
        scores = self.scores
        entries = chosen(CHECKS, ignore=() if scores is not None else ("BN102",))
        found, _ = run_checks(Evidence(layers=layers, images=images, scores=scores), entries)
        return sorted(found, key=lambda finding: finding.id)


def _evidence_of(row: LayerHealth) -> LayerEvidence:
    return LayerEvidence(
        name=row.name,
        kind="BatchNorm",
        family="batch",
        channels=row.channels,
        eps=0.0,
        momentum=row.momentum,
        gamma_trained=row.trained,
        updates=row.updates,
        effective_batch=row.effective_batch,
        effective_batch_at_most=row.effective_batch_at_most,
        sampled=row.batches,
        dead=row.dead,
        near_zero=row.gamma_near_zero,
        off_share=row.off_share,
        mean_off=row.mean_off,
        variance_off=row.variance_off,
    )
