"""The running statistics of a distributed training are not those of all processes together.

## What it measures

The running statistics of all processes, either those of the processes that run (each has to make a diagnosis, on its
own images), or of the state_dicts that the caller passes as `ranks`. Merged, the mean is the mean of their means, and
the variance is the mean of their variances plus the variance of their means. If state_dicts are passed, the model's
own statistics are compared with the merged ones; else those of each process. If any channel is off and there are
labels, the images are classified by the merged statistics too.

## Why it is bad

Without synchronised layers, each process normalises by its own images, and DistributedDataParallel keeps the running
statistics of process 0 alone (DataParallel: those of the first device). If the processes see different images (one
site or one shard each, folders in order), the saved statistics are those of one part. Averaging the variances alone,
as an all-reduce of the buffers does, leaves out how far the means are apart: the variance is too small.

## Reported when

More than half of the channels of a layer are off from the merged statistics, as in BN102: by more than 0.1 standard
deviations or a variance factor of 1.25. It is a warning if accuracy by the merged statistics is higher by at least 1
point with p < 0.01, or if that was not measured, and else advice.

## Known limits

The processes count alike, however many images each had. The error of each running mean adds to the spread of the
means a little. A process waits 10 seconds for the others' diagnoses, and says so if they do not come. Whitening and
frozen layers are not compared. DistributedDataParallel copies process 0's buffers to the others in each forward
(broadcast_buffers=True), after which there is nothing to see: pass state_dicts that were saved before, or look at
BN102.

## Remedy

Recalibrate on images of all processes, or merge means and variances together. In training, synchronise the layers,
and shuffle across processes (DistributedSampler).

## References

Chan, Golub & LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances"; the
documentation of torch.nn.parallel.DistributedDataParallel, broadcast_buffers.
"""

import numpy as np

from bnlab.health.check import RECALIBRATE, Check, Finding, name_layers
from bnlab.health.evidence import Evidence, Floats, LayerEvidence, distances, is_off
from bnlab.health.gather.processes import Ranks

CHECK = Check(
    id="BN015",
    name="ranks-differ",
    severity="warn",
    stage="preview",
    safety="safe",
    needs=("ranks",),
)
_SHARE = 0.5  # of a layer's channels
_SAME = 1e-4  # relative difference of statistics that are the same but for rounding


def check(evidence: Evidence) -> list[Finding]:
    ranks = evidence.part("ranks", Ranks)
    # by layer: which process (None: the model's own statistics) is off in most channels, and in how many
    worst = {name: _worst(evidence.layers[name], ranks) for name in ranks.means}
    failing = {name: found for name, found in worst.items() if found[0] > _SHARE}
    if not failing:
        return []
    names = tuple(sorted(failing, key=lambda name: -failing[name][0]))
    share, number = failing[names[0]]
    layer = evidence.layers[names[0]]
    mean, variance = _far(layer, ranks, number)
    processes = len(ranks.means[names[0]])
    of = "the model's running statistics" if number is None else f"the running statistics of process {number}"
    costs = ranks.cost is None or ranks.cost.matters
    return [
        CHECK.finding(
            severity="warn" if costs else "info",
            layers=names,
            message=(
                f"{of} are not those of all {processes} processes together in "
                f"{name_layers(names, of=len(evidence.normalised))}; in {layer.name or 'the model itself'}, "
                f"{share:.0%} of the channels are off, means by up to {mean.max():.2g} standard deviations and "
                f"variances by up to a factor of {variance.max():.3g}"
            ),
            numbers={
                "processes": processes,
                "off_share": share,
                "mean_off": float(mean.max()),
                "variance_off": float(variance.max()),
            },
            cost=ranks.cost,
            cause=_cause(layer, ranks),
            remedy="recalibrate on images of all processes; in training, synchronise the layers and shuffle images",
            command=RECALIBRATE,
        )
    ]


def _worst(layer: LayerEvidence, ranks: Ranks) -> tuple[float, int | None]:
    numbers: list[int | None] = [None] if ranks.own is None else [*range(len(ranks.means[layer.name]))]
    shares = [float(is_off(*_far(layer, ranks, number)).mean()) for number in numbers]
    return max(shares), numbers[int(np.argmax(shares))]


def _far(layer: LayerEvidence, ranks: Ranks, number: int | None) -> tuple[Floats, Floats]:
    mean, variance = ranks.merged(layer.name)
    if number is not None:
        own = ranks.means[layer.name][number], ranks.variances[layer.name][number]
    else:
        assert layer.running_mean is not None and layer.running_variance is not None
        own = layer.running_mean, layer.running_variance
    return distances(*own, mean, variance, layer.eps)


def _cause(layer: LayerEvidence, ranks: Ranks) -> str:
    if ranks.own is not None:
        return "each process normalises by its own images, and these differ between processes"
    assert layer.running_mean is not None and layer.running_variance is not None
    means, variances = ranks.means[layer.name], ranks.variances[layer.name]
    for number, (mean, variance) in enumerate(zip(means, variances, strict=True)):
        if _same(layer.running_mean, mean) and _same(layer.running_variance, variance):
            return f"the statistics of process {number} were kept alone"
    if _same(layer.running_mean, means.mean(0)) and _same(layer.running_variance, variances.mean(0)):
        return "the variances of the processes were averaged, without how far their means are apart"
    return "the statistics were not merged from those of all processes"


def _same(first: Floats, second: Floats) -> bool:
    return bool(np.allclose(first, second, rtol=_SAME, atol=_SAME))
