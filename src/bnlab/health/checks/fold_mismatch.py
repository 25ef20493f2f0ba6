"""The network with its batch normalisation folded away does not compute what the network computes.

## What it measures

Batch normalisation is folded into the convolutions and linear layers of a copy, by the graph that torch.fx traces. Both
networks are run on eight images. The difference is the largest one of any output, in standard deviations of the
outputs.

## Why it is bad

Export, quantisation and fast inference fold batch normalisation. Where a network does what its graph does not show,
such as branches on attributes or weights that it computes outside of its layers, the folded network is another one.

## Reported when

The difference is larger than 1e-4 and than four times the rounding error of the network itself, which is how far its
outputs are from those in float64. (Where it does not run in float64: larger than 1e-3.) Where rounding changes the
outputs by more than half a standard deviation, there is nothing to compare. A change of the class by a smaller
difference is a tie within rounding.

## Known limits

Other programs fold in other ways: this shows that folding by the graph fails, not that a given exporter does. Eight
images may not take every branch. Layers that cannot be folded are left as they are, and are named in the numbers of a
finding.

## Remedy

Pass an example to `bnlab.norm.fold`, which then refuses instead of returning another network; rewrite what the graph
does not show; or use the network unfolded.

## References

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
section 3.2; Ioffe & Szegedy 2015, Algorithm 2.
"""

from bnlab.errors import plural
from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import Evidence
from bnlab.health.gather.folding import Folded

CHECK = Check(
    id="BN018", name="fold-mismatch", severity="error", stage="preview", safety="display only", needs=("folding",)
)


def check(evidence: Evidence) -> list[Finding]:
    found = evidence.part("folding", Folded)
    parity = found.parity
    if not parity.differs:
        return []
    changed = parity.changed
    classes = "" if changed is None else f", and {changed} of {plural(parity.images, 'image')} get another class"
    return [
        CHECK.finding(
            layers=found.folded,
            message=(
                f"after folding {name_layers(found.folded)}, outputs differ by up to {parity.difference:.2g} of their "
                f"standard deviation, where rounding explains {parity.tolerance:.2g}{classes}"
            ),
            numbers={
                "difference": parity.difference,
                "tolerance": parity.tolerance,
                "changed": parity.changed,
                "images": parity.images,
                "kept": dict(found.kept),
            },
            cause="the model does what its graph does not show, such as a branch on an attribute, or weights that it "
            "computes outside of its layers",
            remedy="fold with an example, which refuses such a model; or use it unfolded",
            command="bnlab.norm.fold(model, example=images)",
        )
    ]
