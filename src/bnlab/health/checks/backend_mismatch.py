"""The network computes something else when it is run in another memory format, precision or program.

## What it measures

A copy is run on eight images in other ways, and its outputs are compared with those of the plain network: by default
with channels_last memory and in bfloat16; if the caller asks for them in float16, compiled, traced, scripted and in
ONNX Runtime. The difference is the largest one of any output, in standard deviations of the outputs. Where it is too
large, the first normalisation layer whose input differs is looked for, on the image that differs most.

## Why it is bad

The network that is deployed is not the one that was validated. Batch normalisation is a usual place for it: its buffers
lose digits or overflow in half precision, and a mean that is large beside the standard deviation is subtracted too
late.

## Reported when

In float32, the difference is larger than 1e-4 and than four times the rounding error of the network itself, which is
how far its outputs are from those in float64 (1e-3 where it does not run in float64). In half precision, at least one
image gets another class (if the outputs are scores of classes), and the difference is larger than 0.25 and than four
times what the outputs change by if only the weights and images are rounded to that precision, in float32 arithmetic;
that is a warning, and an error if outputs are not finite. Where rounding alone changes the outputs by more than half a
standard deviation, there is nothing to compare.

## Known limits

Eight images may not take every branch. Half precision is tried by converting the whole network; autocast keeps some
operations in float32. What cannot be run is said in the notes. On another device results can differ from this one's.

## Remedy

Run the layer that differs first in float32, or rewrite what depends on memory layout; in bfloat16 rather than float16
where values overflow.

## References

pytorch#181696 (compiled evaluation); Micikevicius et al. 2018, "Mixed Precision Training", section 3 (statistics in
float32).
"""

from bnlab.errors import plural
from bnlab.health.check import Check, Finding
from bnlab.health.evidence import Evidence
from bnlab.health.gather.parity import Parity

CHECK = Check(
    id="BN020", name="backend-mismatch", severity="error", stage="preview", safety="display only", needs=("backends",)
)


def check(evidence: Evidence) -> list[Finding]:
    ways = evidence.part("backends", tuple)
    return [_finding(parity) for parity in ways if parity.differs]


def _finding(parity: Parity) -> Finding:
    first = parity.first_layer
    where = f"; the first normalisation layer whose input differs is {first or 'the model itself'}" * (
        first is not None
    )
    off = (
        f"outputs differ by up to {parity.difference:.2g} of their standard deviation, where rounding explains "
        f"{parity.tolerance:.2g}"
        if parity.finite
        else "some outputs are not finite, or have another shape"
    )
    changed = parity.changed
    classes = "" if changed is None else f", and {changed} of {plural(parity.images, 'image')} get another class"
    return CHECK.finding(
        severity="error" if parity.exact or not parity.finite else "warn",
        layers=() if first is None else (first,),
        message=f"run with {parity.way}, {off}{classes}{where}",
        numbers={
            "backend": parity.way,
            "difference": parity.difference,
            "tolerance": parity.tolerance,
            "changed": parity.changed,
            "images": parity.images,
        },
        cause="the model's code depends on how it is run"
        if parity.exact
        else "values that half precision cannot hold: too large, or with a mean that is large beside the deviation",
        remedy=f"validate the model as it is deployed, and do not use {parity.way} until this is repaired"
        if parity.exact
        else "keep what comes before and in that layer in float32",
    )
