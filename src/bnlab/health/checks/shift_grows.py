"""The deeper a layer, the further its inputs are from its running statistics.

## What it measures

For each layer, the distance (Wasserstein-2, in running standard deviations, averaged over the channels) of its inputs
in evaluation from its running statistics, less what chance gives so many images: the noise is subtracted in squares.
A line is fitted to these distances over the layers in the order of their calls.

## Why it is bad

Each layer that normalises by statistics that do not fit passes the error on to the next, whose inputs then fit less.
In a deep network small errors add up.

## Reported when

There are at least 6 layers, the slope is positive with p < 0.01, and the last third of the layers is off by 0.2 or
more and by twice as much as the first third.

## Known limits

Distances of layers one after the other are not independent, so that p is too small. It says that errors add up, not
where they come from: another finding may.

## Remedy

Recalibrate; the layers' order does not matter, since this measures all of them. In the next training, a few layers
without batch normalisation, such as group normalisation, stop the growth.

## References

Huang et al. 2022, "Delving into the estimation shift of batch normalization in a network".
"""

import numpy as np

from bnlab.health.check import RECALIBRATE, Check, Finding
from bnlab.health.evidence import Evidence, LayerEvidence
from bnlab.health.statistics import resampled, shift_of, shifts

CHECK = Check(
    id="BN114",
    name="shift-grows",
    severity="info",
    stage="preview",
    safety="safe",
    needs=("running",),
    images=64,
)
_LAYERS, _FAR, _TIMES, _P_VALUE = 6, 0.2, 2.0, 0.01


def check(evidence: Evidence) -> list[Finding]:
    from scipy.stats import linregress

    layers = [layer for layer in evidence.normalised if layer.depth is not None and shift_of(layer) is not None]
    if len(layers) < _LAYERS:
        return []
    found = np.array([_beyond_chance(layer) for layer in layers])
    if not np.isfinite(found).all() or np.ptp(found) == 0:
        return []
    line = linregress(np.arange(len(layers)), found)
    third = len(layers) // 3
    first, last = float(found[:third].mean()), float(found[-third:].mean())
    if line.slope <= 0 or line.pvalue >= _P_VALUE or last < max(_FAR, _TIMES * first):
        return []
    order = np.argsort(-found)[:third]
    return [
        CHECK.finding(
            layers=tuple(layers[i].name for i in order),
            message=(
                f"the inputs of the layers are further from the running statistics the deeper the layer: {first:.2g} "
                f"standard deviations in the first third of {len(layers)} layers and {last:.2g} in the last, by "
                f"{line.slope:.2g} more with each layer (p = {line.pvalue:.1g})"
            ),
            numbers={"slope": float(line.slope), "slope_p": float(line.pvalue), "first": first, "last": last},
            cause="errors of the statistics add up from layer to layer",
            remedy="recalibrate; see the other findings for where it begins",
            command=RECALIBRATE,
        )
    ]


def _beyond_chance(layer: LayerEvidence) -> float:
    sample, variance = layer.evaluation, layer.running_variance
    distance = shift_of(layer)
    if sample is None or variance is None or distance is None:
        return float("nan")
    if sample.groups is None or len(sample.groups) < 2:
        return distance
    mean, std = resampled(sample, 1, draws=50)
    noise = shifts(mean, (np.sqrt(variance) + std).clip(min=0) ** 2, np.zeros_like(variance), variance).mean()
    return float(np.sqrt(max(0.0, distance**2 - noise**2)))
