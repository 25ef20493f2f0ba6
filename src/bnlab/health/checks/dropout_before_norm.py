"""Dropout changes the variance of a layer's inputs in training, and evaluation has no dropout.

## What it measures

For the layers that run after an active dropout module, the variance of the inputs of 32 images with dropout on (four
draws) over that with dropout off, all layers normalised by batch statistics; of a layer, the median over its
channels.

## Why it is bad

Dropout keeps the mean of its input and raises the variance. The layer after it keeps the variance of training, which
in evaluation is too large: its outputs are too small, and the layers after it get what they never saw.

## Reported when

The ratio is outside 0.9 to 1.1, by more than four standard errors. INFO instead of WARN if the running variances do
not have it (the median ratio of running and population variance lies on the other side of 1, or within 0.95 to 1.05),
as after recalibration: evaluation is right then, though training and evaluation still differ.

## Known limits

Dropout by a function, F.dropout, does not show among the modules. Of two layers in a row after dropout, the first
one's normalisation hides the effect from the second. DropPath and stochastic depth are not looked at.

## Remedy

Recalibrate, which has dropout off. In the next training, put dropout after the last of these layers.

## References

Li et al. 2019, "Understanding the disharmony between dropout and batch normalization by variance shift".
"""

import numpy as np

from bnlab.health.check import RECALIBRATE, Check, Finding, name_layers
from bnlab.health.evidence import Evidence, LayerEvidence
from bnlab.health.gather.training_images import DropoutEvidence

CHECK = Check(
    id="BN108",
    name="dropout-before-norm",
    severity="warn",
    stage="preview",
    safety="safe",
    needs=("dropout",),
    images=16,
)
_LOW, _HIGH, _CERTAIN = 0.9, 1.1, 4.0
_KEPT = 1.05  # a running variance that is off by less does not have the effect


def check(evidence: Evidence) -> list[Finding]:
    part = evidence.part("dropout", DropoutEvidence)
    failing = [name for name in part.ratios if name in evidence.layers and _off(part, name)]
    if not failing:
        return []
    failing.sort(key=lambda name: -abs(np.log(part.ratios[name])))
    kept = [name for name in failing if _kept(evidence.layers[name], part.ratios[name])]
    cost = evidence.scores.compare("running", "population") if evidence.scores and kept else None
    worst = failing[0]
    return [
        CHECK.finding(
            severity="warn" if kept else "info",
            layers=tuple(failing),
            message=(
                f"with dropout ({', '.join(part.modules)}), as in training, the inputs of {name_layers(failing)} have "
                f"another variance than without; in {worst} by a factor of {part.ratios[worst]:.3g}"
            ),
            numbers={"ratios": {name: part.ratios[name] for name in failing}, "in_running_statistics": kept},
            cost=cost if cost is not None and cost.matters else None,
            cause="dropout comes before normalisation",
            remedy="recalibrate, with dropout off; in the next training, put dropout after the last of these layers",
            command=RECALIBRATE if kept else "",
        )
    ]


def _off(part: DropoutEvidence, name: str) -> bool:
    ratio, size = part.ratios[name], abs(np.log(part.ratios[name]))
    edge = np.log(_HIGH) if ratio > 1 else -np.log(_LOW)
    return not _LOW <= ratio <= _HIGH and bool(size - edge > 0 and size > _CERTAIN * part.errors[name])


def _kept(layer: LayerEvidence, ratio: float) -> bool:
    """Whether the running variance has the effect, or is not known not to."""
    if layer.batch is None or layer.running_variance is None:
        return True
    live = layer.batch.variance > 0
    if not live.any():
        return True
    found = float(np.median(layer.running_variance[live] / layer.batch.variance[live]))
    return found > _KEPT if ratio > 1 else found < 1 / _KEPT
