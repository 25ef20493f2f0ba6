"""Running statistics are NaN or infinite, a variance is negative, or half precision cannot hold them.

## What it measures

The running means and variances of each layer, and the factor gamma / sqrt(variance + eps) by which it multiplies.

## Why it is bad

One NaN in a channel makes every output NaN in evaluation, although training by batch statistics goes on as if nothing
had happened. A running average never forgets NaN or infinity. In float16, nothing above 65,504 exists: a larger
variance becomes infinite, and its channel constant.

## Reported when

A running mean or variance is NaN or infinite, or a variance is negative: an error. In a float16 layer, a factor is
above 65,504 (a warning). In a float32 or float64 layer, a mean, a variance or a factor is above 65,504 (advice, for
those who convert the network to float16; bfloat16 has the range of float32).

## Known limits

A value that was infinite in one batch only has left NaN or infinity behind: the check does not say which batch that
was.

## Remedy

Recalibrate in float32 on images whose values are finite. If the weights are not finite either, take an older
checkpoint. For float16: scale the input of the network, or use bfloat16.

## References

Micikevicius et al. 2018, "Mixed Precision Training", section 3; pytorch#1206 and pytorch#90342 (NaN statistics).
"""

import numpy as np
from numpy.typing import NDArray

from bnlab.health.check import RECALIBRATE, Check, Finding, name_layers
from bnlab.health.evidence import Evidence, Floats, LayerEvidence

CHECK = Check(id="BN008", name="broken-statistics", severity="error", stage="preview", safety="safe")
LARGEST_HALF = 65504.0


def check(evidence: Evidence) -> list[Finding]:
    layers = [layer for layer in evidence.layers.values() if layer.running_mean is not None]
    broken = [layer for layer in layers if _broken(layer).any()]
    halves = [layer for layer in layers if layer not in broken and _overflows(layer)]
    found = [_broken_finding(evidence, broken)] if broken else []
    for dtype, failing in (
        ("float16", [layer for layer in halves if layer.dtype == "float16"]),
        ("", [layer for layer in halves if layer.dtype in ("float32", "float64")]),
    ):
        found += [_half_finding(failing, len(layers), is_half=bool(dtype))] if failing else []
    return found


def _broken(layer: LayerEvidence) -> NDArray[np.bool_]:
    """Of each channel."""
    mean, variance = layer.running_mean, layer.running_variance
    assert mean is not None
    none = np.zeros_like(mean) if variance is None else variance
    return ~np.isfinite(mean) | ~np.isfinite(none) | (none < 0)


def _overflows(layer: LayerEvidence) -> bool:
    return max(float(values.max(initial=0.0)) for values in _magnitudes(layer)) > LARGEST_HALF


def _magnitudes(layer: LayerEvidence) -> list[Floats]:
    """Of the mean, the variance and the factor."""
    assert layer.running_mean is not None
    if layer.running_variance is None:
        return [np.abs(layer.running_mean)]
    gamma = 1.0 if layer.gamma is None else np.abs(layer.gamma)
    with np.errstate(all="ignore"):
        factor = gamma / np.sqrt(layer.running_variance + layer.eps)
    return [np.abs(layer.running_mean), layer.running_variance, np.nan_to_num(factor, nan=0.0)]


def _broken_finding(evidence: Evidence, broken: list[LayerEvidence]) -> Finding:
    names = tuple(layer.name for layer in broken)
    first = broken[0]  # layers come in the order of their calls: the others may have it from this one
    mean, variance = first.running_mean, first.running_variance
    assert mean is not None
    both = mean if variance is None else np.concatenate([mean, variance])
    numbers = {
        "nan": int(np.isnan(both).sum()),
        "infinite": int(np.isinf(both).sum()),
        "negative": 0 if variance is None else int((variance < 0).sum()),
        "channels": int(_broken(first).sum()),
    }
    parameters = [a for a in (first.gamma, first.beta) if a is not None]
    trained = all(np.isfinite(a).all() for a in parameters)
    measured = first.batch is not None and first.batch.largest < np.inf
    cause = "a batch whose values were not finite, or too large for half precision"
    if first.dtype == "float16" and not numbers["nan"] and not numbers["negative"]:
        cause = "values above 65,504 were stored in float16"
    elif numbers["negative"] and not numbers["nan"] and not numbers["infinite"]:
        cause = "a momentum outside of 0 to 1, or statistics that were combined or quantised wrongly"
    elif not trained:
        cause = "the training diverged: gamma or beta is not finite either"
    cost = evidence.scores.compare("running", "population") if evidence.scores else None
    return CHECK.finding(
        layers=names,
        message=(
            f"the running statistics of {name_layers(names, of=len(evidence.layers))} are broken; the first of them, "
            f"{first.name}, has {numbers['nan']} NaN, {numbers['infinite']} infinite and {numbers['negative']} "
            f"negative values in {numbers['channels']} of {first.channels} channels"
        ),
        numbers=numbers,
        cost=cost if cost is not None and cost.matters else None,
        cause=cause,
        remedy=(
            "recalibrate in float32"
            if trained and measured
            else "take an older checkpoint, or images whose values are finite, and recalibrate in float32"
        ),
        safety="safe" if trained and measured else "display only",
        command=RECALIBRATE,
    )


def _half_finding(failing: list[LayerEvidence], of: int, *, is_half: bool) -> Finding:
    largest = {layer.name: max(float(values.max()) for values in _magnitudes(layer)) for layer in failing}
    names = tuple(sorted(largest, key=lambda name: -largest[name]))
    worst = next(layer for layer in failing if layer.name == names[0])
    which = int(np.argmax([float(a.max()) for a in _magnitudes(worst)]))
    what = ("running mean", "running variance", "factor gamma / sqrt(variance + eps)")[which]
    return CHECK.finding(
        severity="warn" if is_half else "info",
        layers=names,
        message=(
            f"{'float16' if is_half else 'after a conversion to float16, it'} cannot hold a number of "
            f"{name_layers(names, of=of)}: the largest {what} of {worst.name} is "
            f"{largest[worst.name]:.4g}, above 65,504"
        ),
        numbers={"largest": largest[worst.name], "limit": LARGEST_HALF},
        cause="the input of the layer is not scaled" if which < 2 else "a channel whose variance is almost 0",
        remedy="use bfloat16, or scale the input of the network",
        safety="display only",
        command="model.to(torch.bfloat16)",
    )
