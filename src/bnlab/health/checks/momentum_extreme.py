"""The momentum of the running statistics is 0, at least 0.5, or outside of 0 to 1.

## What it measures

The momentum m of each layer that updates running statistics: an update is (1 - m) x old + m x new.

## Why it is bad

With m = 0 the running statistics never move, so evaluation keeps the initial mean 0 and variance 1. With m = 1 they
are those of the last batch alone, and with m of at least 0.5 those of the last few, so evaluation depends on which
images came last. A negative m, or one above 1, weighs old or new statistics negatively: variances can become
negative, and the statistics diverge. TensorFlow, Keras and Caffe give the weight of the old statistics instead, which
is 1 - m: their 0.9 and 0.99 are PyTorch's 0.1 and 0.01.

## Reported when

m is negative or above 1 (an error); m is 0 and all means are 0 and all variances 1 (an error); m is at least 0.5 (a
warning); m is 0 and there are other statistics (advice: it is a way to freeze them). Layers that are frozen or keep
no statistics do not use their momentum, and are left out.

## Known limits

The momentum says what training will do with the statistics, not what they are: recalibrated ones are right until
then.

## Remedy

Set the momentum, 0.1 in most cases, and recalibrate if the network has been trained with the wrong one. A later
training will then have other running statistics, so this is not a safe remedy for one that goes on. To freeze
statistics, use `bnlab.norm.freeze`, which does not depend on the momentum.

## References

PyTorch, torch.nn.BatchNorm2d, the note on momentum; TensorFlow, tf.keras.layers.BatchNormalization, momentum.
"""

from bnlab.health.check import Check, Finding, Severity, name_layers
from bnlab.health.evidence import Evidence, LayerEvidence

CHECK = Check(id="BN006", name="momentum-extreme", severity="warn", stage="preview", safety="unsafe")
_LARGE = 0.5


def check(evidence: Evidence) -> list[Finding]:
    used = [
        layer for layer in evidence.layers.values() if layer.tracks and not layer.frozen and layer.momentum is not None
    ]
    found: list[Finding] = []
    for momentum in sorted({layer.momentum for layer in used if layer.momentum is not None}):
        layers = [layer for layer in used if layer.momentum == momentum]
        if momentum == 0:
            initial = [layer for layer in layers if _is_initial(layer)]
            found += _finding(0.0, initial, "error", len(used))
            found += _finding(0.0, [layer for layer in layers if layer not in initial], "info", len(used))
        elif not 0 <= momentum <= 1:
            found += _finding(momentum, layers, "error", len(used))
        elif momentum >= _LARGE:
            found += _finding(momentum, layers, "warn", len(used))
    return found


def _is_initial(layer: LayerEvidence) -> bool:
    mean, variance = layer.running_mean, layer.running_variance
    return mean is not None and variance is not None and bool((mean == 0).all() and (variance == 1).all())


def _finding(momentum: float, layers: list[LayerEvidence], severity: Severity, of: int) -> list[Finding]:
    if not layers:
        return []
    names = tuple(layer.name for layer in layers)
    effect, cause = _explain(momentum, severity)
    right = round(1 - momentum, 6) if _LARGE < momentum < 1 else 0.1
    return [
        CHECK.finding(
            severity=severity,
            layers=names,
            message=(
                f"momentum is {momentum:g} in {name_layers(names, of=of)}, which TensorFlow calls {1 - momentum:g}: "
                f"{effect}"
            ),
            numbers={"momentum": momentum, "tensorflow": round(1 - momentum, 12)},
            cause=cause,
            remedy=(
                "freeze the statistics with norm.freeze, or set the momentum"
                if severity == "info"
                else f"set the momentum to {right:g}, and recalibrate if it was trained so"
            ),
            command=f'for m in model.modules(): hasattr(m, "momentum") and setattr(m, "momentum", {right:g})',
        )
    ]


def _explain(momentum: float, severity: Severity) -> tuple[str, str]:
    """The effect, and the likely cause."""
    if not 0 <= momentum <= 1:
        return "an update weighs statistics negatively, so they diverge", "a slip of the sign or of the decimal point"
    if momentum == 0 and severity == "error":
        return "the running statistics are the initial mean 0 and variance 1, and never move", "momentum was set to 0"
    if momentum == 0:
        return "the running statistics never move", "they were frozen in this way"
    return (
        "the running statistics are those of the last batch alone"
        if momentum == 1
        else f"the last batch weighs {momentum:.0%} in the running statistics",
        "the value of another framework, where it is the weight of the old statistics"
        if _LARGE < momentum < 1
        else "momentum was taken for the weight of the old statistics"
        if momentum == 1
        else "momentum was set high",
    )
