"""The images are not like those that the statistics are of.

## What it measures

The distance (Wasserstein-2, in standard deviations, averaged over the channels) between the statistics of a layer's
inputs, where all layers normalise by their running statistics, and the running ones; with training images
(reference=), between the statistics of both sets of images. It is compared with the 99.5% quantile of what chance
gives: a bootstrap over up to 32 parts of the images, widened for few parts by Student's distribution, and the noise
of a moving average. With reference=, chance is that of the largest distance of any layer, which corrects for their
number.

Stale statistics (BN102) move layers too. Without reference=, only the first layer is judged, whose input depends on
no other statistics. Where that input is affine in the pixels, as after convolutions, its mean follows from the mean
colour of the images: if some mean colour explains the running means within 0.02 standard deviations and a tenth of
their size on average, they belong to the present weights, and it is the images that are others. Stale means do not
have that form, unless they weigh the initial ones (0, 1) too much: nothing is reported if less than half of the
distance remains when these are taken out.

## Why it is bad

The network normalises by the wrong means and variances: it works on images as if they had the contrast and colours of
the training.

## Reported when

The distance is above that quantile and at least 0.2; without reference=, if a mean colour explains the running means.
Not reported if other preprocessing (BN112) or another size (BN113) explains the distance. WARN if adapted statistics
win at least 1 point of accuracy with p < 0.01, or without labels by reference=; INFO otherwise.

## Known limits

Without reference=, the check says nothing where the first layer's input is not affine in an image's colours, or has
fewer than 13 channels (7 for grey images), or where images are not N x C x H x W. Statistics of augmented images
(BN107) look like those of another domain. Where the mean colour is 0, stale weights do not show. A shift that leaves
means and variances as they are is not seen. At least four batches are needed. The order of batches matters: parts of
a video are not independent, and chance is then larger than measured.

## Remedy

Adapt the statistics: with n new images, weight them n / (N + n) against the old ones, where N is about 16 to 256
times less than a training set; recalibrating on many new images is the limit.

## References

Schneider et al. 2020, "Improving robustness against common corruptions by covariate shift adaptation", equation 1; Li
et al. 2016, "Revisiting batch normalization for practical domain adaptation".
"""

import numpy as np

from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.checks import resolution_shift, wrong_preprocessing
from bnlab.health.evidence import Evidence, Floats, LayerEvidence, Sample
from bnlab.health.gather.inputs import Colours
from bnlab.health.gather.training_images import ReferenceEvidence
from bnlab.health.statistics import resampled, shift_of, shifts, weight_of_initial
from bnlab.streams import Use, random_stream

CHECK = Check(
    id="BN111",
    name="domain-shift",
    severity="warn",
    stage="preview",
    safety="unsafe",
    needs=("running",),
    reads=("reference", "colours", "preprocessing", "resolution"),
    images=64,
)
_FAR = 0.2
_QUANTILE = 0.995
_EXPLAINED, _SHARE = 0.02, 0.1  # standard deviations, and of the running means
_UNMIXED = 0.5  # of the distance: what remains if the initial statistics are taken out
_PARTS = 4


def check(evidence: Evidence) -> list[Finding]:
    if wrong_preprocessing.better(evidence) is not None or resolution_shift.better(evidence) is not None:
        return []
    reference = evidence.part("reference", ReferenceEvidence) if evidence.has("reference") else None
    found = _first(evidence) if reference is None else _against(evidence, reference)
    if not found:
        return []
    cost = evidence.scores.compare("running", "population") if evidence.scores else None
    names = sorted(found, key=lambda name: -found[name])
    colours = evidence.part("colours", Colours) if evidence.has("colours") else None
    than = "that the running statistics are of" if reference is None else "of the training"
    worst = names[0]
    return [
        CHECK.finding(
            severity="warn" if (reference is not None if cost is None else cost.matters) else "info",
            layers=tuple(names),
            message=(
                f"the images are not like those {than}: the inputs of "
                f"{name_layers(names, of=len(evidence.normalised))} differ, in {worst} by {found[worst]:.2g} standard "
                "deviations on average"
            ),
            numbers={
                "distances": dict(found),
                "mean_colour": None if colours is None else list(colours.present),
                "trained_mean_colour": None if colours is None else list(colours.trained),
            },
            cost=cost if cost is not None and cost.matters else None,
            cause="the images come from another domain than those of the training, such as another camera",
            remedy="adapt the statistics: weight those of n such images n / (N + n) against the running ones",
            command="bnlab.health.repair(model, batches, [bnlab.health.repairs.adapt()])",
        )
    ]


def _first(evidence: Evidence) -> dict[str, float]:
    """Without training images: the layers that are off, if the first one is and its running means suit the weights."""
    reached = [layer for layer in evidence.normalised if layer.depth is not None]
    colours = evidence.part("colours", Colours) if evidence.has("colours") else None
    if not reached or colours is None or colours.layer != reached[0].name:
        return {}
    first = reached[0]
    if colours.unexplained > min(_EXPLAINED, _SHARE * colours.size) or _is_initial(first):
        return {}
    distance, sample = shift_of(first), first.evaluation
    if distance is None or distance < _FAR or sample is None or first.running_variance is None:
        return {}
    chance = _chance(sample, None, first, first.running_variance)
    if chance is None or distance <= np.quantile(chance, _QUANTILE):
        return {}
    all_shifts = {layer.name: shift_of(layer) or 0.0 for layer in reached}
    return {name: far for name, far in all_shifts.items() if far >= _FAR}


def _is_initial(layer: LayerEvidence) -> bool:
    """Whether the running statistics are far from the inputs because they still weigh the initial ones."""
    weight, distance, sample = weight_of_initial(layer), shift_of(layer), layer.evaluation
    if not weight or weight > 0.99 or distance is None or sample is None:
        return bool(weight)
    assert layer.running_mean is not None and layer.running_variance is not None
    mean, variance = layer.running_mean / (1 - weight), (layer.running_variance - weight) / (1 - weight)
    return float(shifts(sample.mean, sample.variance, mean, variance.clip(min=0)).mean()) < _UNMIXED * distance


def _against(evidence: Evidence, reference: ReferenceEvidence) -> dict[str, float]:
    found: dict[str, float] = {}
    chances: list[Floats] = []
    for layer in evidence.normalised:
        sample, other = layer.evaluation, reference.evaluation.get(layer.name)
        if sample is None or other is None:
            continue
        chance = _chance(sample, other, layer, other.variance)
        if chance is None:
            continue
        chances.append(chance)
        found[layer.name] = float(shifts(sample.mean, sample.variance, other.mean, other.variance).mean())
    if not chances:
        return {}
    limit = max(_FAR, float(np.quantile(np.max(chances, axis=0), _QUANTILE)))
    return {name: far for name, far in found.items() if far > limit}


def _chance(sample: Sample, other: Sample | None, layer: LayerEvidence, variance: Floats) -> Floats | None:
    """Draws of the distance that chance alone gives; None if there are too few parts."""
    if sample.groups is None or len(sample.groups) < _PARTS:
        return None
    mean, std = resampled(sample, 1)
    if other is not None:
        if other.groups is None or len(other.groups) < _PARTS:
            return None
        means, stds = resampled(other, 2)
        mean, std = mean - means, std - stds
    elif layer.momentum:
        m = min(layer.momentum, 1.0)
        noise = random_stream(0, Use.NOISE).standard_normal(mean.shape)
        mean = mean + noise * np.sqrt(np.nan_to_num(sample.between) * m / (2 - m))
    base = np.sqrt(variance.clip(min=0))
    return np.asarray(shifts(mean, (base + std).clip(min=0) ** 2, np.zeros_like(variance), variance).mean(1))
