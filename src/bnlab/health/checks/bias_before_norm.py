"""A convolution or linear layer has a bias that the batch normalisation after it subtracts again.

## What it measures

Whether the layer whose output a normalisation layer reads, and nothing else reads, has a bias; and how large it is in
standard deviations of the normalisation layer's input. The channels of both must be the same, with no dropout
between.

## Why it is bad

In training the layer subtracts the batch's mean, and the bias with it: the bias has no effect on the output and no
gradient but rounding errors. An optimiser that scales gradients, such as Adam, makes steps of the usual size of
these, so the bias drifts. It costs memory, and where it has drifted far from 0, bfloat16 and float16 lose the digits
of what is left: at 32 standard deviations, neighbouring bfloat16 numbers are a quarter of a standard deviation apart.

## Reported when

There is such a bias: advice. A warning if it has drifted in more than 5% of a layer's channels: it is above 4 times the
largest |weight| of its layer (by default, both begin within the same bounds) and above 32 standard deviations of the
normalisation layer's input, the mean of that input is above 32, too, and the bias is the larger part of it. Channels
whose variance is below eps are not counted.

## Known limits

It must be clear which layer made the input: a bias added by the caller's own code is not seen. Frozen layers are left
out, since a bias before them has an effect.

## Remedy

Drop the bias and subtract it from the running mean: the outputs stay the same. In the network's code, use bias=False.

## References

Ioffe & Szegedy 2015, section 3.2: "the bias b can be ignored".
"""

import numpy as np

from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import Evidence, LayerEvidence

CHECK = Check(id="BN013", name="bias-before-norm", severity="info", stage="preview", safety="safe")
_DRIFTED = 32.0  # standard deviations
_MOVED = 4.0  # times the largest weight; by default both begin within the same bounds
_CHANNELS = 0.05  # of a layer


def check(evidence: Evidence) -> list[Finding]:
    failing = [
        layer
        for layer in evidence.layers.values()
        if layer.before_bias is not None
        and layer.before_bias.any()
        and not layer.before_shared
        and layer.calls == 1
        and not layer.frozen
    ]
    if not failing:
        return []
    sizes = {layer.name: _in_standard_deviations(layer) for layer in failing}
    failing.sort(key=lambda layer: -(sizes[layer.name] or 0))
    worst, names = failing[0], tuple(layer.name for layer in failing)
    drifted = [layer.name for layer in failing if _drifted(layer)]
    size = sizes[worst.name]
    return [
        CHECK.finding(
            severity="warn" if drifted else "info",
            layers=names,
            message=(
                f"the bias of the layer before has no effect in {name_layers(names, of=len(evidence.layers))}"
                + (
                    f"; the largest, of {worst.before}, is {size:.2g} standard deviations of the input of {worst.name}"
                    if size is not None
                    else ""
                )
                + (f", and {name_layers(drifted)} would lose digits in half precision" if drifted else "")
            ),
            numbers={
                "parameters": sum(layer.channels for layer in failing),
                "largest": size,
                "drifted": drifted,
                "before": {layer.name: layer.before for layer in failing},
            },
            cause=(
                "the bias has no gradient but rounding errors, which the optimiser follows"
                if drifted
                else "convolutions and linear layers have a bias by default"
            ),
            remedy="drop the bias, and subtract it from the running mean; use bias=False in the network's code",
            command=_command(worst),
        )
    ]


def _in_standard_deviations(layer: LayerEvidence) -> float | None:
    """The largest |bias| in standard deviations of the layer's input; None if these are not known."""
    if layer.batch is None or layer.before_bias is None:
        return None
    live = layer.batch.variance > layer.eps
    ratio = np.abs(layer.before_bias[live]) / np.sqrt(layer.batch.variance[live])
    return float(ratio.max(initial=0.0))


def _drifted(layer: LayerEvidence) -> bool:
    sample, bias = layer.batch, layer.before_bias
    if sample is None or bias is None:
        return False
    limit = _DRIFTED * np.sqrt(sample.variance)
    weight = np.inf if layer.before_weight is None else layer.before_weight.max()
    far = (
        (np.abs(bias) > _MOVED * weight)
        & (np.abs(bias) > limit)
        & (np.abs(sample.mean) > limit)
        & (np.abs(sample.mean - bias) < np.abs(bias))
    )
    return float((far & (sample.variance > layer.eps)).mean()) > _CHANNELS


def _command(layer: LayerEvidence) -> str:
    before = f'model.get_submodule("{layer.before}")'
    mean = f'model.get_submodule("{layer.name}").running_mean.sub_({before}.bias.detach()); '
    return f"{mean if layer.running_mean is not None else ''}{before}.bias = None"
