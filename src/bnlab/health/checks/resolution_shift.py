"""The images have another size than those that the statistics are of.

## What it measures

32 images are scaled by 0.5, 0.71, 1.41 and 2, and the inputs of all layers are compared with the running statistics
(Wasserstein-2 distance in running standard deviations, averaged over channels and layers). This is only done if they
do not fit as they are, that is if the distance is above 0.1.

## Why it is bad

A photo at another size shows larger or smaller objects, coarser or finer texture and more or less border: the layers'
inputs are distributed in another way than the running statistics say, and accuracy is lost.

## Reported when

At another size the distance is smaller by a factor of 1.5 and by 0.05 at least, and at most 0.4, and no other
preprocessing explains it (BN112).

## Known limits

Images that were made too small have lost detail that scaling does not bring back, so that this is found less often
than images that are too large. A network that takes one size alone is measured up to its last such layer. The four
factors are a coarse grid: the size that is named is an estimate. Blurred or noisy images look like images of another
size.

## Remedy

Use the size of the training, or recalibrate on images of the size that is used.

## References

Touvron et al. 2019, "Fixing the train-test resolution discrepancy", section 3.
"""

from bnlab.health.check import RECALIBRATE, Check, Finding
from bnlab.health.checks import wrong_preprocessing
from bnlab.health.evidence import Evidence
from bnlab.health.gather.inputs import Trial, Trials

CHECK = Check(
    id="BN113",
    name="resolution-shift",
    severity="warn",
    stage="preview",
    safety="safe",
    needs=("resolution",),
    images=16,
    reads=("preprocessing",),
)
_RATIO, _GAIN, _FIT = 1.5, 0.05, 0.4


def better(evidence: Evidence) -> Trial | None:
    """The size at which the statistics fit; None if there is none, or it was not measured."""
    if not evidence.has("resolution") or wrong_preprocessing.better(evidence) is not None:
        return None
    trials = evidence.part("resolution", Trials)
    best, now = trials.best, trials.present.distance
    if best is None or now < _RATIO * best.distance or now - best.distance < _GAIN or best.distance > _FIT:
        return None
    return best


def check(evidence: Evidence) -> list[Finding]:
    best = better(evidence)
    if best is None:
        return []
    trials = evidence.part("resolution", Trials)
    now = trials.present
    cost = evidence.scores.compare("running", "population") if evidence.scores else None
    return [
        CHECK.finding(
            message=(
                f"the running statistics fit images of {best.name} pixels, and the images have {now.name}: the layers' "
                f"inputs are {now.distance:.2g} standard deviations away on average, and would be {best.distance:.2g}"
            ),
            numbers={"factor": best.value, "distance": now.distance, "scaled_distance": best.distance},
            cost=cost if cost is not None and cost.matters else None,
            cause="the images have another size than those of the training",
            remedy=f"use images of about {best.name} pixels, or recalibrate on images of this size",
            command=RECALIBRATE,
        )
    ]
