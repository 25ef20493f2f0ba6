"""After folding, the weights of some channels are much larger than those of the others, which costs digits in int8.

## What it measures

Folding multiplies each output channel of the convolution or linear layer before by gamma / sqrt(variance + eps). The
ratio of the largest |weight| after that over all channels to its median over channels (without those that are 0).

## Why it is bad

An int8 weight with one scale for the whole layer has 127 steps for the largest channel, and 127 / ratio for the
median one. At a ratio of 16 these are 8: the weights of half of the channels keep fewer than 4 bits and the sign.

## Reported when

The ratio is above 16. This is advice for those who quantise the network.

## Known limits

It needs a layer before it that nothing else reads, whose weights are used as they are. Quantisation with one scale
for each channel, which most backends can do for weights, is not affected. Ranges of activations are not looked at.

## Remedy

Use a scale for each channel, or equalise the ranges of successive layers. Channels with a variance of almost 0, whose
factor is large, can be pruned.

## References

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 3; Krishnamoorthi
2018, "Quantizing deep convolutional networks for efficient inference", section 3.1.
"""

import numpy as np

from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import Evidence, Floats, LayerEvidence

CHECK = Check(id="BN019", name="int8-range", severity="info", stage="preview", safety="display only")
_RATIO = 16.0
_STEPS = 127  # of int8, on each side of 0


def check(evidence: Evidence) -> list[Finding]:
    folded = {name: found for name, layer in evidence.layers.items() if (found := _folded(layer)) is not None}
    ratios = {name: float(found.max() / np.median(found[found > 0])) for name, found in folded.items()}
    names = tuple(sorted((name for name in ratios if ratios[name] > _RATIO), key=lambda name: -ratios[name]))
    if not names:
        return []
    worst = evidence.layers[names[0]]
    steps = _STEPS / ratios[worst.name]
    return [
        CHECK.finding(
            layers=names,
            message=(
                f"the folded weights before {name_layers(names, of=len(folded))} differ by more than {_RATIO:g} times "
                f"between channels; the largest channel of {worst.before} is {ratios[worst.name]:.4g} times the median "
                f"one, which is left {steps:.2g} of {_STEPS} int8 steps"
            ),
            numbers={
                "ratio": ratios[worst.name],
                "steps": steps,
                "largest_channel": int(folded[worst.name].argmax()),
                "ratios": {name: ratios[name] for name in names},
            },
            cause="gamma / sqrt(variance + eps) is large where a channel has little variance",
            remedy="quantise with one scale for each channel",
        )
    ]


def _folded(layer: LayerEvidence) -> Floats | None:
    """The largest |weight| of each channel after folding; None where the layer cannot be folded."""
    if layer.before_weight is None or layer.before_shared or layer.calls != 1 or not layer.usable:
        return None
    assert layer.running_variance is not None
    if layer.family not in ("batch", "frozen") or (layer.running_variance + layer.eps <= 0).any():
        return None
    gamma = 1.0 if layer.gamma is None else np.abs(layer.gamma)
    found: Floats = layer.before_weight * gamma / np.sqrt(layer.running_variance + layer.eps)
    return found if np.isfinite(found).all() and (found > 0).any() else None
