"""Values before a layer are too large for half precision, or not finite.

## What it measures

The largest absolute value among the inputs of each layer, over all images, by running and by batch statistics,
against 65504, the largest number that float16 holds.

## Why it is bad

In float16, as under autocast on a GPU, larger values become infinite. Normalisation makes NaN of an infinite value,
and one NaN spoils the statistics of its layer for good.

## Reported when

ERROR: a layer gets values that are not finite. WARN: values above 65504. INFO: above half of that, 32752.

## Known limits

Values above 65504 are no fault as long as the network runs in float32 or bfloat16. Other images can give larger values.
Only inputs of these layers are seen, not what happens between them.

## Remedy

Use bfloat16, which has the range of float32, or run that layer and what comes before it in float32. Where values are
not finite, find the first such layer: its weights or images, or the statistics before it, are broken (BN008).

## References

Micikevicius et al. 2018, "Mixed precision training", section 3; pytorch#1206 and pytorch#90342 (NaN statistics).
"""

from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import Evidence, LayerEvidence
from bnlab.health.gather.recorder import EXACT

CHECK = Check(
    id="BN115",
    name="overflow",
    severity="warn",
    stage="preview",
    safety="display only",
)
_LARGEST = 65504.0  # of float16


def check(evidence: Evidence) -> list[Finding]:
    if not evidence.images:
        return []
    infinite = [layer.name for layer in evidence.layers.values() if layer.not_finite]
    largest = {layer.name: _largest(layer) for layer in evidence.layers.values() if not layer.not_finite}
    near = [name for name, value in largest.items() if value > EXACT]
    near.sort(key=lambda name: -largest[name])
    findings: list[Finding] = []
    if infinite:
        findings.append(
            CHECK.finding(
                severity="error",
                layers=tuple(infinite),
                message=f"values that are not finite reach {name_layers(infinite)}, {infinite[0]} first",
                numbers={"largest": None},
                cause="values grew too large for their type, or weights, statistics or images hold NaN or infinity",
                remedy=f"look at what comes before {infinite[0]}; in half precision, use bfloat16 or float32",
            )
        )
    if near:
        worst = near[0]
        findings.append(
            CHECK.finding(
                severity="warn" if largest[worst] > _LARGEST else "info",
                layers=tuple(near),
                message=(
                    f"values of up to {largest[worst]:.3g} reach {name_layers(near)}, and float16 ends at "
                    f"{_LARGEST:g}; the largest reach {worst}"
                ),
                numbers={"largest": largest[worst], "limit": _LARGEST},
                cause="the weights before the layer, or the images, are large",
                remedy="use bfloat16 instead of float16, or run that layer in float32",
                command="torch.autocast(device_type, dtype=torch.bfloat16)",
            )
        )
    return findings


def _largest(layer: LayerEvidence) -> float:
    samples = [sample for sample in (layer.evaluation, layer.batch) if sample is not None]
    return max((sample.largest for sample in samples), default=0.0)
