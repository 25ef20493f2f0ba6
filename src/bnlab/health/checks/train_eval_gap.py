"""The network is better by batch statistics than by the running statistics that evaluation uses.

## What it measures

The same images are classified twice, with the weights fixed and dropout off: by the running statistics, as in
evaluation, and by the statistics of each batch, as in training. Both times there is no augmentation but what is in the
images themselves.

## Why it is bad

The network has learnt what it can do by batch statistics. What it loses by the running ones is lost in evaluation and
in use, for a reason that usually can be repaired without training.

## Reported when

Accuracy by running statistics is lower by at least 1 percentage point (another metric: 1% of its size), with p < 0.01
by an exact McNemar test on the same images.

## Known limits

Batch statistics depend on which images are together. If the batches are sorted by class, a network may recognise the
class from the company that an image is in, or fail because of it: accuracy by batch statistics then says nothing, and
nothing is reported (see BN105). Batches of other sizes than in training have other noise.

## Remedy

Whichever of the other findings explains it: stale statistics (BN102), small batches (BN103), augmentation (BN107),
dropout before a layer (BN108), another domain (BN111), preprocessing (BN112) or resolution (BN113). The report says how
many points each explains. If none does, recalibrate on training images.

## References

Ioffe & Szegedy 2015, section 3.1; Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm"; pytorch#5406.
"""

from bnlab.health.check import RECALIBRATE, Check, Finding
from bnlab.health.evidence import Evidence

CHECK = Check(
    id="BN101",
    name="train-eval-gap",
    severity="warn",
    stage="preview",
    safety="safe",
    needs=("running", "batch", "scores"),
    images=32,
)


def check(evidence: Evidence) -> list[Finding]:
    if evidence.scores is None or evidence.sorted_by_class:
        return []
    gap = evidence.scores.compare("running", "batch")
    if gap is None or not gap.matters:
        return []
    recalibrated = evidence.scores.compare("running", "population")
    if recalibrated is not None and recalibrated.matters:
        after = recalibrated.text(recalibrated.after)
        cause = f"the running statistics do not fit: recalibrated ones give {after}"
        repair = {"remedy": "recalibrate", "command": RECALIBRATE}
    else:
        cause = "not the running statistics alone, since recalibration does not win it back"
        repair = {"remedy": "see the other findings; without any, train with larger batches", "safety": "unsafe"}
    return [
        CHECK.finding(
            message="the network is worse by its running statistics, which evaluation uses, than by batch statistics",
            numbers=evidence.scores.means(),
            cost=gap,
            cause=cause,
            **repair,
        )
    ]
