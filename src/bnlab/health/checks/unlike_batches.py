"""The batches differ from one another more than shuffled ones would.

## What it measures

At each layer, with the network as in evaluation, where images do not depend on each other: the variance between
batches of the batch mean, and the variance between images of the image's mean within batches. If the images are
shuffled, the first is the second divided by the number of images in a batch (one-way analysis of variance), and their
ratio has the F distribution. The correlation of each batch's mean with the next one's tells slow drift from groups of
images. Where there are labels, the distinct classes in a batch are counted, and compared with those in shuffled
batches.

## Why it is bad

Batch statistics of images that are alike are not those of the population: training normalises each batch by its own
class, site or scene, and a network may even recognise the class from the company that an image is in. Evaluation has
nothing of it. Here, it makes all that is measured by batch statistics doubtful.

## Reported when

In more than half of the channels of a layer, the ratio is not explained by chance (F test; 1% of the channels at most
by chance, Benjamini & Hochberg 1995, divided by the number of layers), and in the median channel it is at least 2. Or
when a batch holds less than 0.7 times as many classes as shuffled batches would.

## Known limits

The doctor sees the batches that it gets. If only these are in order, and those of the training were shuffled, the
training is sound, but batch statistics here still say nothing. Layers that are called several times in a forward, or
that get several rows of an image, are not tested. Batches that are more alike than shuffled ones (stratified) are no
fault.

## Remedy

Shuffle: `DataLoader(..., shuffle=True)`, or a buffer large enough to mix classes, sites and scenes where data are
streamed. In training, each process has to get a mixture, too.

## References

Fisher 1925, "Statistical Methods for Research Workers", on the analysis of variance; von Neumann 1941 (successive
differences); Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 5;
layumi/Person_reID_baseline_pytorch#218.
"""

from dataclasses import dataclass

import numpy as np

from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import Evidence, LayerEvidence
from bnlab.health.statistics import FALSE_DISCOVERIES, benjamini_hochberg

CHECK = Check(
    id="BN105",
    name="unlike-batches",
    severity="warn",
    stage="preview",
    safety="display only",
    needs=("running",),
    images=32,
)
_SHARE = 0.5  # of a layer's channels
_RATIO = 2.0  # of the variances, in the median channel
_DRIFT = 0.5  # correlation of a batch's mean with the next one's
_DRIFT_BATCHES = 8  # from which on it can be told


@dataclass(frozen=True)
class _Tested:
    """The median over channels of the ratio of variances and of the correlation, and the share that is significant."""

    ratio: float
    correlation: float
    share: float

    @property
    def unlike(self) -> bool:
        return self.ratio >= _RATIO and self.share > _SHARE


def check(evidence: Evidence) -> list[Finding]:
    layers = [layer for layer in evidence.normalised if layer.calls == 1 and layer.evaluation is not None]
    tested = {layer.name: found for layer in layers if (found := _test(layer, evidence, len(layers))) is not None}
    unlike = {name: found for name, found in tested.items() if found.unlike}
    if not unlike and not evidence.sorted_by_class:
        return []
    names = tuple(sorted(unlike, key=lambda name: -unlike[name].ratio))
    numbers: dict[str, float] = {}
    parts = []
    cause = "images that belong together, such as those of one site, scene or person, are in one batch"
    if names:
        worst = unlike[names[0]]
        numbers |= {"ratio": worst.ratio}
        parts.append(
            f"the batch means differ more than those of shuffled batches in {name_layers(names, of=len(tested))}; in "
            f"{names[0] or 'the model itself'}, their variance is {worst.ratio:.1f} times as large"
        )
        if evidence.batches >= _DRIFT_BATCHES:
            numbers |= {"correlation": worst.correlation}
            if worst.correlation > _DRIFT:
                parts[-1] += f", and a batch resembles the next one (correlation {worst.correlation:.2f})"
                cause = "the images are in the order in which they were taken, as in a video, or in another slow order"
    if evidence.sorted_by_class and evidence.classes_in_batch is not None:
        held, shuffled = evidence.classes_in_batch
        numbers |= {"classes": held, "classes_if_shuffled": shuffled}
        cause = "the batches are sorted by class"
        parts.append(
            f"a batch holds {held:.1f} classes on average, where shuffled ones would hold {shuffled:.1f}, so that "
            "batch statistics say nothing"
        )
    return [
        CHECK.finding(
            layers=names,
            message="; ".join(parts),
            numbers=numbers,
            cause=cause,
            remedy="shuffle the images, here and in training",
            command="DataLoader(dataset, batch_size=..., shuffle=True)",
        )
    ]


def _test(layer: LayerEvidence, evidence: Evidence, layers: int) -> _Tested | None:
    from scipy.stats import f

    sample = layer.evaluation
    assert sample is not None
    if sample.between_images is None or sample.successive is None or sample.batches < 2:
        return None
    live = sample.variance > layer.eps  # of the others, what differs may be rounding
    if not live.any():
        return None
    between, images = sample.between[live] * evidence.batch_size, sample.between_images[live]
    with np.errstate(all="ignore"):
        ratio = between / images
        correlation = 1 - sample.successive[live] / sample.between[live]
    ratio = np.where(np.isnan(ratio), 1.0, ratio)
    p = f.sf(ratio, sample.batches - 1, max(evidence.images - sample.batches, 1))
    significant = benjamini_hochberg(p, FALSE_DISCOVERIES / layers)
    return _Tested(
        ratio=float(np.median(ratio)),
        correlation=float(np.median(np.nan_to_num(correlation))),
        share=float(significant.mean()),
    )
