"""The caller's validation changes the running statistics.

## What it measures

The running statistics and num_batches_tracked of each layer before and after validate(model). It is undone.

## Why it is bad

The statistics then hold validation images: the result is not an estimate for new images any more, depends on the order
of the images, and each validation changes the next one and the model that is saved afterwards.

## Reported when

The running mean, variance or num_batches_tracked of any layer differs after validate, by any amount.

## Known limits

A validation that recalibrates the model on purpose does the same; it should do so on a copy, or with training images.

## Remedy

Call model.eval() at the start of the validation, and look for code that sets parts of the model to training.

## References

Documentation of torch.nn.Module.eval; pytorch#4741 and pytorch#5406.
"""

from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import Evidence
from bnlab.health.gather.modes import Validation

CHECK = Check(
    id="BN012",
    name="validation-moves-statistics",
    severity="error",
    stage="preview",
    safety="display only",
    needs=("validation",),
)


def check(evidence: Evidence) -> list[Finding]:
    moved = evidence.part("validation", Validation).moved
    if not moved:
        return []
    names = tuple(sorted(moved, key=lambda name: -moved[name].mean))
    worst = moved[names[0]]
    return [
        CHECK.finding(
            layers=names,
            message=(
                f"validate changed the statistics of {name_layers(names, of=len(evidence.layers))}; in {names[0]}, by "
                f"{worst.batches} batches by num_batches_tracked, and means by up to {worst.mean:.2g} "
                "standard deviations"
            ),
            numbers={"batches": worst.batches, "mean_moved": worst.mean},
            cause="validation runs in training mode",
            remedy="call model.eval() at its start",
            command="model.eval()",
        )
    ]
