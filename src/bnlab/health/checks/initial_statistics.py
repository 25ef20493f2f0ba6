"""The running statistics still hold much of the initial mean 0 and variance 1.

## What it measures

The weight of the initial statistics in the running ones, in two ways. By the counter: (1 - m)^n after n batches with
momentum m. By the numbers: where the running statistics lie on the line from the population statistics of the images
(weight 0) to mean 0 and variance 1 (weight 1), by least squares over all channels of a layer. The second tells a
short training from recalibrated statistics, which may have the same momentum and as few batches.

## Why it is bad

In evaluation the network normalises by a mixture of the statistics of its inputs and of numbers that have nothing to
do with them.

## Reported when

In a layer, the weight by the counter is above 1%; the weight by the numbers is above 1% and between half of that by
the counter and one and a half times it; and chance does not explain it: it is above the 99.9% point of a
t-distribution times its standard error. With K batches that error is s sqrt(max(m / (2 - m), 1 / n) + 1 / K), where s
is the standard deviation of the weight between batches. Two batches are needed. Layers with the same m and n have the
same weight, so more than half of those whose error is small enough to tell must agree. If the images are labelled and
the accuracy by recalibrated statistics is not better by at least 1 percentage point with p < 0.01, it is advice,
otherwise a warning.

## Known limits

If the inputs of a layer have mean 0 and variance 1 anyhow, the weight cannot be told from the numbers, and does no
harm. If statistics were recalibrated on few batches of images of another variance, this may look the same in a
network with one layer or two.

## Remedy

Recalibrate. If training goes on, raise the momentum or train for more batches: momentum 0.1 forgets all but 1% in 44
batches, 0.01 in 459, and 0.001 in 4,603.

## References

Ioffe & Szegedy 2015, Algorithm 2; Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3.
"""

import numpy as np

from bnlab.health.check import RECALIBRATE, Check, Finding, name_layers
from bnlab.health.evidence import Evidence, LayerEvidence
from bnlab.health.statistics import weight_of_initial

CHECK = Check(
    id="BN007",
    name="initial-statistics",
    severity="warn",
    stage="preview",
    safety="safe",
    needs=("population",),
)
_WEIGHT = 0.01
_LEAST, _MOST = 0.5, 1.5  # times the weight by the counter; others mean that the statistics were replaced since
_AGREEING = 0.5  # of the layers
_CONFIDENCE = 0.999


def check(evidence: Evidence) -> list[Finding]:
    weights = _weights(evidence)
    if not weights:
        return []
    names = tuple(sorted(weights, key=lambda name: -weights[name]))
    worst = evidence.layers[names[0]]
    cost = evidence.scores.compare("running", "population") if evidence.scores else None
    costs = cost is None or cost.matters
    return [
        CHECK.finding(
            severity="warn" if costs else "info",
            layers=names,
            message=(
                f"the initial mean 0 and variance 1 still weigh more than {_WEIGHT:.0%} in the running statistics of "
                f"{name_layers(names, of=len(evidence.normalised))}; in {worst.name} they weigh "
                f"{weights[worst.name]:.1%}, and {worst.initial_weight or 0:.1%} by momentum {worst.momentum:g} and "
                f"{worst.updates or 0:,} batches"
            ),
            numbers={"weight": weights[worst.name], "expected": worst.initial_weight, "updates": worst.updates},
            cost=cost if costs else None,
            cause=(
                f"momentum {worst.momentum:g} is small for {worst.updates:,} batches"
                if worst.updates
                else "no batch has updated the statistics"
            ),
            remedy="recalibrate; in training, raise the momentum",
            command=RECALIBRATE,
        )
    ]


def _weights(evidence: Evidence) -> dict[str, float]:
    """The weights of the initial statistics in the layers that are to be reported."""
    groups: dict[tuple[float | None, int | None], dict[str, float]] = {}  # of all layers that can be told
    for layer in evidence.normalised:
        expected = layer.initial_weight
        if expected is None or expected <= _WEIGHT:
            continue
        found, error = weight_of_initial(layer), _error(layer)
        if found is not None and error is not None and error < expected:
            agrees = found > max(_WEIGHT, error) and _LEAST < found / expected < _MOST
            groups.setdefault((layer.momentum, layer.updates), {})[layer.name] = found if agrees else 0.0
    weights: dict[str, float] = {}
    for group in groups.values():
        agreeing = {name: weight for name, weight in group.items() if weight}
        if len(agreeing) > _AGREEING * len(group):
            weights |= agreeing
    return weights


def _error(layer: LayerEvidence) -> float | None:
    """How large a weight chance can give: the quantile times the standard error."""
    from scipy.stats import t

    sample = layer.batch
    if sample is None or sample.groups is None or len(sample.groups) < 2:
        return None
    scale = sample.variance + layer.eps
    target = np.concatenate([-sample.mean / np.sqrt(scale), (1 - sample.variance) / scale])
    off = (sample.groups - sample.groups.mean(0)) / np.stack([np.sqrt(scale), scale])
    weights = off.reshape(len(off), -1) @ target / (target @ target)  # of each group of batches
    of_batch = weights.var(ddof=1) * sample.batches / len(weights)
    momentum = min(layer.momentum or 0.0, 1.0)
    chance = max(momentum / (2 - momentum), 1 / max(layer.updates or 1, 1)) + 1 / sample.batches
    return float(t.ppf(_CONFIDENCE, len(weights) - 1) * np.sqrt(of_batch * chance))
