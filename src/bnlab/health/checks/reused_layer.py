"""One layer is used more than once in a forward, so that its running statistics mix the inputs of all uses.

## What it measures

How often a forward calls each batch normalisation layer. The inputs of each use are measured on 32 images, by running
statistics, and compared with those of the first use, channel by channel.

## Why it is bad

In training, each use normalises by its own batch statistics; in evaluation, all uses normalise by one average of all.
If the uses have inputs of different mean or variance, the average fits none of them.

## Reported when

A layer is called more than once: advice. It is a warning if, for a use, more than half of the channels are off: their
mean differs from the first use's by more than 0.1 standard deviations, or their variance by more than a factor of 1.25,
and chance does not explain it (a test paired by image, of means and of mean squares, with 1% of the layer's channels at
most by chance, Benjamini & Hochberg 1995).

## Known limits

32 images do not show small differences. Shared layers are usual where inputs are alike, as in siamese networks or in
detection heads that are used at several sizes.

## Remedy

Use one layer for each use; gamma and beta may still be shared.

## References

Cooijmans et al. 2017, "Recurrent Batch Normalization" (statistics for each time step); Lin et al. 2017, RetinaNet, and
Ghiasi et al. 2019, NAS-FPN (shared heads with separate batch normalisation).
"""

import numpy as np

from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import Evidence, Floats, distances, is_off
from bnlab.health.gather.uses import Use, Uses
from bnlab.health.statistics import significant

CHECK = Check(
    id="BN011",
    name="reused-layer",
    severity="warn",
    stage="preview",
    safety="display only",
    needs=("uses",),
)
_OFF_SHARE = 0.5  # of a layer's channels


def check(evidence: Evidence) -> list[Finding]:
    found: dict[str, tuple[float, float, float]] = {}
    for name, uses in evidence.part("uses", Uses).layers.items():
        if len(uses) > 1:
            found[name] = max(_compare(uses[0], use, evidence.layers[name].eps) for use in uses[1:])
    if not found:
        return []
    off = {name: values for name, values in found.items() if values[0] > _OFF_SHARE}
    names = tuple(sorted(off or found, key=lambda name: found[name], reverse=True))
    share, mean, variance = found[names[0]]
    calls = evidence.layers[names[0]].calls
    return [
        CHECK.finding(
            severity="warn" if off else "info",
            layers=names,
            message=(
                f"one forward uses {name_layers(names, of=len(evidence.normalised))} more than once, {names[0]} "
                f"{calls} times; between its uses, {share:.0%} of the channels are off, means by up to {mean:.2g} "
                f"standard deviations and variances by up to a factor of {variance:.3g}"
            ),
            numbers={"calls": calls, "off_share": share, "mean_off": mean, "variance_off": variance},
            cause="one module is called at several places of the forward, or in a loop",
            remedy="use one layer for each use" if off else "nothing, as long as the inputs of the uses are alike",
        )
    ]


def _compare(first: Use, other: Use, eps: float) -> tuple[float, float, float]:
    """The share of channels that are off, and the largest distance of a mean and of a variance."""
    mean, variance = distances(other.mean, other.variance, first.mean, first.variance, eps)
    chance = _differs(first.image_means, other.image_means) | _differs(first.image_squares, other.image_squares)
    return float((is_off(mean, variance) & chance).mean()), float(mean.max()), float(variance.max())


def _differs(first: Floats, other: Floats) -> np.typing.NDArray[np.bool_]:
    """Which columns of N x C differ: paired if there are as many rows, which then are the same images."""
    n, m = len(first), len(other)
    if min(n, m) < 2:
        return np.zeros(first.shape[1], bool)
    if n == m:
        difference = other - first
        return significant(difference.mean(0), difference.std(0, ddof=1) / np.sqrt(n))
    error = np.sqrt(first.var(0, ddof=1) / n + other.var(0, ddof=1) / m)
    return significant(other.mean(0) - first.mean(0), error)
