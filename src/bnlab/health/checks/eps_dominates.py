"""The variance of channels is smaller than eps, so eps rather than the variance normalises them.

## What it measures

For each channel, its variance against eps: the population variance of the images, or the running variance where that
was not measured. With variance v, a channel's output has the standard deviation sqrt(v / (v + eps)) instead of 1:
0.71 where v = eps, and 0.953 where v = 10 eps. Channels with a variance below eps / 1,000,000 are constant, and are
not counted: nothing comes into them.

## Why it is bad

Such a channel is not normalised. How strong it is depends on the scale of the weights before it, the gradient is not
scaled by its spread, and a network that is moved to a framework with another eps (TensorFlow's default is 0.001,
PyTorch's 0.00001) computes something else.

## Reported when

More than 5% of a layer's channels have a variance below eps: advice. A warning if more than half have one below eps /
100: their outputs have a standard deviation of less than 0.1, so the layer as a whole does not normalise.

## Known limits

The trained network has learnt with its eps, so its evaluation is not wrong. Channels with almost no variance often
have dead channels before them; see BN109.

## Remedy

For the next training: scale the input of the network to a variance of about 1, or use a smaller eps. To set eps of a
trained network without a change of its outputs, multiply gamma by sqrt((v + new) / (v + old)) with the running
variance v.

## References

Ioffe & Szegedy 2015, Algorithm 1.
"""

import numpy as np

from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import Evidence, Floats, LayerEvidence

CHECK = Check(id="BN009", name="eps-dominates", severity="warn", stage="preview", safety="unsafe")
_SHARE = 0.05  # of a layer's channels
_MOST = 0.5
_FAR_BELOW = 0.01  # times eps
_CONSTANT = 1e-6  # times eps


def check(evidence: Evidence) -> list[Finding]:
    shares = {layer.name: _share(layer, 1) for layer in evidence.layers.values()}
    failing = [layer for layer in evidence.layers.values() if shares[layer.name] > _SHARE]
    if not failing:
        return []
    failing.sort(key=lambda layer: (-_share(layer, _FAR_BELOW), -shares[layer.name]))
    worst, names = failing[0], tuple(layer.name for layer in failing)
    variance = _variance(worst)
    assert variance is not None
    median = float(np.median(variance))
    near = _share(worst, 10)
    passing = [layer.name for layer in failing if _share(layer, _FAR_BELOW) > _MOST]
    return [
        CHECK.finding(
            severity="warn" if passing else "info",
            layers=names,
            message=(
                f"more than {_SHARE:.0%} of the channels have a variance below eps in "
                f"{name_layers(names, of=len(evidence.layers))}; in {worst.name}, {shares[worst.name]:.0%} are below "
                f"eps = {worst.eps:g} and {near:.0%} below 10 eps, and the median variance is {median:.2g}"
            ),
            numbers={
                "below_eps": shares[worst.name],
                "below_10_eps": near,
                "eps": worst.eps,
                "median": median,
                "passing": passing,
            },
            cause=(
                "the input of the layer is scaled down, or its eps is large"
                if passing or shares[worst.name] > _MOST
                else "channels that carry almost nothing; see the dead channels, if there are some"
            ),
            remedy="scale the input to a variance of about 1, or train with a smaller eps",
        )
    ]


def _variance(layer: LayerEvidence) -> Floats | None:
    return layer.running_variance if layer.batch is None else layer.batch.variance


def _share(layer: LayerEvidence, factor: float) -> float:
    """Which part of the channels has a variance below eps times this factor, without constant channels."""
    variance = _variance(layer)
    if variance is None or not len(variance):
        return 0.0
    return float(((variance > _CONSTANT * layer.eps) & (variance < factor * layer.eps)).mean())
