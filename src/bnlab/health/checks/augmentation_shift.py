"""The running statistics are those of augmented images, and evaluation gets plain ones.

## What it measures

The population statistics of each layer's inputs on augmented and on plain training images (reference=, or the images
diagnosed), by batch statistics with the weights fixed; and the accuracy on the images diagnosed with both.

## Why it is bad

Crops, colour changes, mixing and erasing change the distribution of the layers' inputs. Training keeps statistics of
these; the plain images of evaluation have others, and lose accuracy that recalibration wins back.

## Reported when

In some layer more than half of the channels are off (by more than 0.1 standard deviations or a variance factor of
1.25, and for the mean significantly so), the running statistics are nearer to those of the augmented images, and
accuracy by running statistics is lower than by those of the plain images by at least 1 point with p < 0.01, and so is
accuracy by the statistics of augmented images. Without labels, by the first two conditions.

## Known limits

Without reference=, the plain images are those diagnosed: if these are not like those of the training, that difference
counts as well. Statistics that are stale besides (BN102) can hide which images they are nearer to.

## Remedy

Recalibrate on plain training images. The weights are not changed.

## References

Touvron et al. 2019, "Fixing the train-test resolution discrepancy"; Wu & Johnson 2021, "Rethinking 'Batch' in
BatchNorm", section 5.
"""

import numpy as np

from bnlab.health.check import RECALIBRATE, Check, Finding, name_layers
from bnlab.health.compare import Comparison
from bnlab.health.evidence import Evidence, LayerEvidence, Sample, distances, is_off
from bnlab.health.gather.training_images import AugmentedEvidence
from bnlab.health.statistics import shift_of, significant

CHECK = Check(
    id="BN107",
    name="augmentation-shift",
    severity="warn",
    stage="preview",
    safety="safe",
    needs=("augmented", "population"),
    images=32,
)
_OFF_SHARE = 0.5


def check(evidence: Evidence) -> list[Finding]:
    part = evidence.part("augmented", AugmentedEvidence)
    shares: dict[str, float] = {}
    nearer: list[float] = []
    for layer in evidence.normalised:
        augmented, plain = part.augmented.get(layer.name), part.plain.get(layer.name)
        if augmented is None or plain is None or layer.frozen:
            continue
        shares[layer.name] = _off_share(layer, augmented, plain)
        far, near = shift_of(layer, plain), shift_of(layer, augmented)
        if far is not None and near is not None:
            nearer.append(far - near)
    failing = sorted((name for name in shares if shares[name] > _OFF_SHARE), key=lambda name: -shares[name])
    if not failing or not nearer or np.mean(nearer) <= 0:
        return []
    cost = None
    if part.by_augmented is not None and part.by_plain is not None:
        kind = evidence.scores.kind if evidence.scores else "accuracy"
        cost = Comparison.measure(part.by_augmented, part.by_plain, kind)
        running = evidence.scores.running if evidence.scores else None
        now = cost if running is None else Comparison.measure(running, part.by_plain, kind)
        if not (cost.matters and now.matters):
            return []
    worst = failing[0]
    mean, variance = _far(evidence.layers[worst], part.augmented[worst], part.plain[worst])
    return [
        CHECK.finding(
            layers=tuple(failing),
            message=(
                f"augmented images give {name_layers(failing, of=len(shares))} other statistics than plain ones, and "
                f"the running statistics are those of augmented images; in {worst}, {shares[worst]:.0%} of the "
                f"channels differ, means by up to {mean:.2g} standard deviations and variances by up to "
                f"a factor of {variance:.3g}"
            ),
            numbers={"off_share": shares[worst], "mean_off": mean, "variance_off": variance},
            cost=cost,
            cause="training measured the statistics on augmented images",
            remedy="recalibrate on plain training images",
            command=RECALIBRATE,
        )
    ]


def _off_share(layer: LayerEvidence, augmented: Sample, plain: Sample) -> float:
    mean, variance = distances(augmented.mean, augmented.variance, plain.mean, plain.variance, layer.eps)
    noise = augmented.between / augmented.batches + plain.between / plain.batches
    chance = significant(augmented.mean - plain.mean, np.sqrt(noise))
    far = is_off(np.zeros_like(variance), variance)
    return float((far | (is_off(mean, np.ones_like(variance)) & chance)).mean())


def _far(layer: LayerEvidence, augmented: Sample, plain: Sample) -> tuple[float, float]:
    mean, variance = distances(augmented.mean, augmented.variance, plain.mean, plain.variance, layer.eps)
    return float(mean.max()), float(variance.max())
