"""The running statistics of a layer are not the population statistics of its inputs.

## What it measures

The images are run with the weights fixed and each layer normalised by its batch; merged over all batches, the means and
variances of the layers' inputs are the population statistics. For each channel, the running mean is compared with that
mean, and the running variance with that variance, and the images are classified with both.

A channel is off if its mean differs by more than 0.1 standard deviations or its variance by more than a factor of 1.25,
and if chance does not explain the difference. With momentum m and K batches, a running mean that is right differs from
the measured one by chance with variance s (m / (2 - m) + 1 / K), where s is the variance between batches of the batch
mean, and a running variance likewise; of statistics that count n batches, 1 / n stands for m / (2 - m) if it is larger.
Of the channels of a layer that are found significant by Student's t, 1% are so by chance (Benjamini & Hochberg 1995).
While bnlab trains, channels are off by the two thresholds alone.

## Why it is bad

In evaluation a network normalises by these statistics. If they are not those of the layer's inputs, evaluation runs
another function than training optimised, and loses accuracy for no reason.

## Reported when

More than a tenth of the channels of a layer are off, and accuracy by running statistics is lower than by population
statistics by at least 1 percentage point (another metric: 1% of its size), with p < 0.01 by an exact McNemar test on
the same images. Without labels, when more than half of the channels of a layer are off; as INFO unless training images
are given as the reference, since a shift of the domain looks the same. While bnlab trains, where no
test tells chance apart: when more than half of the channels are off and accuracy is lower by as much; once, at the end
of the training, if it holds at the last validation.

## Known limits

The doctor measures population statistics on the training images that are passed as the reference, and else on the
images that it diagnoses. If these are not like those that the network was trained on, the difference may be a shift of
the domain (BN111) instead. While bnlab trains, population statistics are measured on plain photos at the size of
inference, running statistics on augmented crops, early in a training at smaller sizes: channels can be off without any
lag. So a difference alone is not reported where its cost can be measured. Few images cannot show a small cost.

## Remedy

Recalibrate: measure the population statistics anew, on 1,000 to 10,000 training images without augmentation
(`bnlab.norm.recalibrate`). The weights are not changed. If the initial statistics (mean 0,
variance 1) still weigh more than 1%, which is (1 - m)^n after n batches, raise the momentum or train longer. The files
that bnlab trains, best.safetensors and last.safetensors, hold the population statistics and lose nothing; raise
norm_momentum or lower learning_rate in the recipe if the network is used with its running statistics elsewhere.

## References

Ioffe & Szegedy 2015, Algorithm 2; Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3; pytorch#5406 and
pytorch#4741 (evaluation far worse than training).
"""

from dataclasses import replace

import numpy as np

from bnlab.health.check import RECALIBRATE, Check, Finding, name_layers
from bnlab.health.evidence import Evidence, LayerEvidence, distances
from bnlab.health.gather.training_images import ReferenceEvidence
from bnlab.health.statistics import OFF_SHARE, OFF_SHARE_OF_COST, off_share, weight_of_initial

CHECK = Check(
    id="BN102",
    name="stale-statistics",
    severity="warn",
    stage="preview",
    safety="safe",
    needs=("population",),
    reads=("reference",),
    images=32,
)
_INITIAL = 0.01  # above this weight of the initial statistics, the momentum is the likely cause


def check(evidence: Evidence) -> list[Finding]:
    layers = [_on_training_images(layer, evidence) for layer in evidence.normalised]
    shares = {layer.name: off_share(layer) for layer in layers}
    cost = evidence.scores.compare("running", "population") if evidence.scores else None
    failing = [
        layer
        for layer in layers
        if not _broken(layer)
        and (shares[layer.name] or 0) > (OFF_SHARE_OF_COST if cost is not None and layer.batch else OFF_SHARE)
    ]
    if not failing or (cost is not None and not cost.matters):
        return []
    failing.sort(key=lambda layer: -(shares[layer.name] or 0))
    worst, numbers = failing[0], _numbers(failing[0])
    names = tuple(layer.name for layer in failing)
    cause, remedy = (
        "the statistics lag behind the weights, or the images are not like those of the training",
        "recalibrate",
    )
    initial = (worst.initial_weight or 0) if worst.batch is None else (weight_of_initial(worst) or 0)
    expected = worst.initial_weight or 0
    if initial > _INITIAL and expected > _INITIAL:
        cause = (
            f"the initial statistics still weigh {initial:.0%}, since momentum {worst.momentum:g} is small for "
            f"{worst.updates} batches"
        )
        remedy = "recalibrate; in training, raise the momentum"
    if worst.batch is None:  # by the monitor of a training
        remedy = (
            "none for best.safetensors and last.safetensors, which hold the population statistics; elsewhere "
            "recalibrate, raise norm_momentum or lower learning_rate"
        )
    return [
        CHECK.finding(
            severity="warn" if cost is not None or evidence.has("reference") else "info",
            layers=names,
            message=(
                f"the running statistics of {name_layers(names, of=len(evidence.normalised))} differ from the "
                f"population statistics; in {worst.name}, {shares[worst.name]:.0%} of the channels are off, means by "
                f"up to {numbers['mean_off']:.2g} standard deviations and variances by up to a factor of "
                f"{numbers['variance_off']:.3g}"
            ),
            numbers={"off_share": shares[worst.name], **numbers, "initial_weight": initial},
            cost=cost,
            cause=cause,
            remedy=remedy,
            command=RECALIBRATE,
        )
    ]


def _broken(layer: LayerEvidence) -> bool:
    """Whether the running statistics are not finite, which BN008 reports."""
    given = [values for values in (layer.running_mean, layer.running_variance) if values is not None]
    return not all(np.isfinite(values).all() for values in given)


def _on_training_images(layer: LayerEvidence, evidence: Evidence) -> LayerEvidence:
    """The layer with what was measured on training images, where the caller gave some."""
    reference = evidence.part("reference", ReferenceEvidence) if evidence.has("reference") else None
    if reference is None or layer.name not in reference.batch:
        return layer
    return replace(layer, batch=reference.batch[layer.name], evaluation=reference.evaluation.get(layer.name))


def _numbers(layer: LayerEvidence) -> dict[str, float | None]:
    if layer.batch is None or layer.running_mean is None or layer.running_variance is None:
        return {"mean_off": layer.mean_off, "variance_off": layer.variance_off}
    sample = layer.batch
    mean, variance = distances(layer.running_mean, layer.running_variance, sample.mean, sample.variance, layer.eps)
    return {"mean_off": float(mean.max()), "variance_off": float(variance.max())}
