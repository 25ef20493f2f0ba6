"""The last batch of a pass is much smaller than the others, and weighs as much in the running statistics.

## What it measures

The sizes of the batches: all but the last have B images, and the last one has what is left over.

## Why it is bad

A running average with momentum m gives the last batch of an epoch the weight m, however few images are in it, and
evaluation usually comes next. With b images in place of B, the variance of the running mean's error grows by a share
of m (2 - m) (B / b - 1): by 57% for m = 0.1 and b = B / 4, by three times for b = B / 16. A single image at a layer
of 1 x 1 maps cannot be normalised at all (BN001).

## Reported when

The last batch has fewer than a quarter of the images of the others, which are of one size, and layers are not frozen.
It is advice: what it costs depends on the epoch's last batch.

## Known limits

It is of no importance if the training's loader drops the last batch, or is not the one that was passed. A diagnosis
that stops at its limit of images before the last batch does not see it. Batches whose sizes differ, such as those of
sequences sorted by length, are not judged.

## Remedy

`DataLoader(..., drop_last=True)` for training, where shuffling leaves out other images in each epoch; or another
batch size; or recalibrate before evaluation, where each image weighs the same.

## References

Ioffe & Szegedy 2015, section 3.1; pytorch#4534 (a last batch of one image).
"""

from bnlab.health.check import Check, Finding
from bnlab.health.evidence import Evidence

CHECK = Check(
    id="BN106",
    name="short-last-batch",
    severity="info",
    stage="preview",
    safety="display only",
    needs=("running",),
)
_SHARE = 0.25  # of the usual batch


def check(evidence: Evidence) -> list[Finding]:
    last, usual = evidence.last_batch_size, evidence.batch_size
    layers = [x for x in evidence.normalised if x.usable and not x.frozen and x.calls and x.tracks and x.momentum]
    if not layers or last is None or last >= _SHARE * usual:
        return []
    if evidence.images != (evidence.batches - 1) * usual + last:  # the sizes differ anyway
        return []
    momentum = max(layer.momentum or 0.0 for layer in layers)
    growth = momentum * (2 - momentum) * (usual / last - 1)
    return [
        CHECK.finding(
            message=(
                f"the last of {evidence.batches} batches has {last} of {usual} images; if training ends an epoch with "
                f"it, it has the weight {momentum:g} in the running statistics, and the variance of their means' error "
                f"grows by {growth:.0%}"
            ),
            numbers={"last_batch": last, "batch": usual, "growth": growth},
            cause="the number of images is not a multiple of the batch size",
            remedy="drop the last batch of a training's epoch, or recalibrate before evaluation",
            command="DataLoader(dataset, batch_size=..., shuffle=True, drop_last=True)",
        )
    ]
