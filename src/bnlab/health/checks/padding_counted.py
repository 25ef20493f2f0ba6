"""Statistics count positions that are padding.

## What it measures

The share of positions that the caller calls padding (`padding`), and at each layer whose input is N x C x L, with the
L of that mask, the mean and variance of each channel over all positions and over those that are not padding, with the
network as in evaluation.

A channel is off if its mean differs by more than 0.1 standard deviations, or its variance by more than a factor of
1.25, and if chance does not explain that the padded positions of an image have another mean than its other positions,
or, for the variance, another distance from the mean (paired t-test over the images that have both; 1% of a layer's
channels at most by chance, Benjamini & Hochberg 1995).

## Why it is bad

The statistics depend on how much padding a batch has, thus on the longest sequence in it. An image or a sequence gets
another output in other company, and evaluation with other padding than in training has statistics that do not fit.

## Reported when

More than half of the channels of a layer are off.

## Known limits

What it costs is not measured: it depends on the padding of the batches in use. Layers that get packed or flattened
sequences, or another length (after pooling or strides), are not looked at, nor is padding within convolutions.

## Remedy

Compute the statistics of the positions that are not padding (masked batch normalisation), normalise packed sequences,
or sort sequences into batches of like length, so that there is little padding. Layer normalisation over channels does
not mix positions.

## References

pytorch#70529 (batch normalisation of padded sequences); Ioffe & Szegedy 2015, section 3.2.
"""

import numpy as np

from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import Evidence, Floats, distances, is_off
from bnlab.health.gather.padding import PaddedLayer, Padding
from bnlab.health.statistics import benjamini_hochberg

CHECK = Check(
    id="BN025",
    name="padding-counted",
    severity="warn",
    stage="preview",
    safety="display only",
    needs=("padding",),
)
_SHARE = 0.5  # of a layer's channels


def check(evidence: Evidence) -> list[Finding]:
    padding = evidence.part("padding", Padding)
    shares = {name: _off_share(layer, evidence.layers[name].eps) for name, layer in padding.layers.items()}
    failing = tuple(sorted((n for n in shares if shares[n] > _SHARE), key=lambda name: -shares[name]))
    if not failing:
        return []
    worst = failing[0]
    mean, variance = (float(x.max()) for x in _far(padding.layers[worst], evidence.layers[worst].eps))
    return [
        CHECK.finding(
            layers=failing,
            message=(
                f"{padding.share:.0%} of the positions are padding, and are counted in the statistics of "
                f"{name_layers(failing, of=len(evidence.normalised))}; in {worst or 'the model itself'}, "
                f"{shares[worst]:.0%} of the channels are off by it, means by up to {mean:.2g} standard deviations and "
                f"variances by up to a factor of {variance:.3g}"
            ),
            numbers={
                "padded_share": padding.share,
                "off_share": shares[worst],
                "mean_off": mean,
                "variance_off": variance,
            },
            cause="the layer does not know which positions are padding",
            remedy="compute the statistics without padded positions, or put sequences of like length into a batch",
        )
    ]


def _far(layer: PaddedLayer, eps: float) -> tuple[Floats, Floats]:
    return distances(layer.mean, layer.variance, layer.mean_without, layer.variance_without, eps)


def _off_share(layer: PaddedLayer, eps: float) -> float:
    from scipy.stats import t

    mean, variance = _far(layer, eps)
    with np.errstate(all="ignore"):
        p = 2 * t.sf(np.abs(layer.difference) / layer.error, max(layer.pairs - 1, 1))  # 2 x C
    by_mean, by_square = (benjamini_hochberg(np.where(np.isnan(row), 1.0, row)) for row in p)
    far_mean, far_variance = is_off(mean, np.ones_like(mean)), is_off(np.zeros_like(mean), variance)
    return float(((far_mean & by_mean) | (far_variance & (by_mean | by_square))).mean())
