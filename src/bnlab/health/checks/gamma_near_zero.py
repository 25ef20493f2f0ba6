"""Some channels of a layer carry almost nothing, or pass the ReLU as if there were none.

## What it measures

Near zero: the channels whose |gamma| is below 1% of the median of their layer. Linear: for a layer that feeds a ReLU
directly, the other channels with beta / |gamma| > 3, of which the ReLU passes more than 99.8% by the normal
distribution.

## Why it is bad

It is a hint rather than a fault. Channels near zero are almost constant, so the layer is wider than what it learnt
needs, or the learning rate drove gamma to 0. In a linear channel the activation has no effect.

## Reported when

More than 5% of a layer's channels are near zero, or more than 5% are linear, in layers whose gamma is trained.

## Known limits

A small gamma before a layer that rescales can matter. Layers whose gamma starts at 0 (the last of a residual branch,
in some recipes) have a median near 0 as well, and are not found. Normalised values are not normally distributed.

## Remedy

Try a smaller width, or a lower learning rate (in bnlab: `width`, `learning_rate`). Channels near zero can be pruned,
with what is constant in them added to the bias of the next layer.

## References

Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming"; Ioffe & Szegedy 2015, section
3, on gamma and beta.
"""

import numpy as np

from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import Evidence, LayerEvidence
from bnlab.health.statistics import RECTIFIERS

CHECK = Check(id="BN110", name="gamma-near-zero", severity="info", stage="preview", safety="unsafe")
_NEAR_ZERO = 1e-2  # of the layer's median |gamma|
_LINEAR = 3.0  # beta / |gamma|
_CHANNELS = 0.05  # of a layer


def check(evidence: Evidence) -> list[Finding]:
    layers = [layer for layer in evidence.layers.values() if layer.gamma_trained]
    found = {layer.name: _count(layer) for layer in layers}
    failing = [layer for layer in layers if max(found[layer.name]) > _CHANNELS * layer.channels]
    if not failing:
        return []
    failing.sort(key=lambda layer: -max(found[layer.name]) / layer.channels)
    worst, names = failing[0], tuple(layer.name for layer in failing)
    small, linear = found[worst.name]
    return [
        CHECK.finding(
            layers=names,
            message=(
                f"some channels are almost constant, since gamma is below {_NEAR_ZERO:.0%} of their layer's median, or "
                f"pass the ReLU unchanged in {name_layers(names, of=len(evidence.layers))}; worst layer {worst.name}: "
                f"{small} near zero and {linear} linear of {worst.channels}"
            ),
            numbers={
                "near_zero": small,
                "linear": linear,
                "channels": worst.channels,
                "total": [sum(found[name][i] for name in names) for i in (0, 1)],
            },
            cause="the network is wider than it needs to be, or the learning rate was too high",
            remedy="try a smaller width or a lower learning rate (width, learning_rate)",
        )
    ]


def _count(layer: LayerEvidence) -> tuple[int, int]:
    """How many channels are near zero, and how many are linear."""
    if layer.gamma is None:  # by the monitor of a training
        return layer.near_zero or 0, 0
    gamma = np.abs(layer.gamma)
    small = gamma < _NEAR_ZERO * np.median(gamma)
    if layer.beta is None or layer.activation not in RECTIFIERS:
        return int(small.sum()), 0
    return int(small.sum()), int((~small & (layer.beta > _LINEAR * gamma)).sum())
