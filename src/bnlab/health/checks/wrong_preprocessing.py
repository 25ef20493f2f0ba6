"""The images are preprocessed in another way than those that the network was trained on.

## What it measures

The inputs of the first layer that keeps statistics depend on no other statistics, only on the images and the weights
before it. Their distance from the running statistics (Wasserstein-2, in running standard deviations, averaged over
the channels) is measured for 64 images as they are and changed: into pixels from 0 to 1, 0 to 255 and -1 to 1, with
ImageNet's mean and standard deviation, (value - 127) / 128, and each with red and blue swapped. What the images are
now follows from mean= and std= if they were passed, and else from their smallest and largest values. If the images
look like none of these, each way is applied and undone once more. Each forward ends at that layer.

## Why it is bad

The network gets images unlike any that it has seen. It loses accuracy on all of them, without any error.

## Reported when

As they are, the images are more than 0.15 standard deviations away, and with a change they are at most half as far,
by at least 0.15, and at most 0.4 away (0.1 if red and blue are swapped). Or the change brings them nearer by at least
13% and 0.05, to at most 0.45, and the outputs of up to 256 images agree: accuracy is higher by a point (p < 0.01), or
the entropy of the classes' probabilities is lower with p < 0.01 (one-sided paired test). Never if accuracy is
significantly lower with the change.

## Known limits

Swapped colours change natural photos little, and images of another domain, such as bluish ones, can look as if they
were swapped; the outputs of a trained network decide then, and on some photos they do not. Which of two like ways it
is, such as (value - 127) / 128 and pixels from -1 to 1, cannot be seen. Other mistakes, such as squashed instead of
cropped photos, are not looked for. Images of one channel are not checked.

## Remedy

Preprocess the images as in training.

## References

Schneider et al. 2020, "Improving robustness against common corruptions by covariate shift adaptation", for the
distance.
"""

from bnlab.health.check import Check, Finding
from bnlab.health.evidence import Evidence
from bnlab.health.gather.inputs import FITS, Trial, Trials

CHECK = Check(
    id="BN112",
    name="wrong-preprocessing",
    severity="warn",
    stage="preview",
    safety="display only",
    needs=("preprocessing",),
    images=16,
)
_CLEAR_RATIO, _CLEAR_GAIN, _CLEAR_FIT, _CLEAR_FIT_SWAPPED = 2.0, 0.15, 0.4, 0.1
_RATIO, _GAIN, _FIT = 1.15, 0.05, 0.45
_CERTAIN = 2.33  # standard errors: p < 0.01, one-sided


def better(evidence: Evidence) -> Trial | None:
    """The change of the images that explains the running statistics; None if there is none, or it was not measured."""
    if not evidence.has("preprocessing"):
        return None
    trials = evidence.part("preprocessing", Trials)
    best, now = trials.best, trials.present.distance
    if best is None or now <= FITS or (trials.cost is not None and trials.cost.reversed().matters):
        return None
    gain = now - best.distance
    clear = (
        now >= _CLEAR_RATIO * best.distance
        and gain >= _CLEAR_GAIN
        and best.distance <= (_CLEAR_FIT_SWAPPED if best.swapped else _CLEAR_FIT)
    )
    helps = trials.cost is not None and trials.cost.matters
    surer = trials.certainty is not None and trials.certainty >= _CERTAIN
    slight = now >= _RATIO * best.distance and gain >= _GAIN and best.distance <= _FIT and (helps or surer)
    return best if clear or slight else None


def check(evidence: Evidence) -> list[Finding]:
    best = better(evidence)
    if best is None:
        return []
    trials = evidence.part("preprocessing", Trials)
    now = trials.present
    wrong = f"your input looks like {now.name}, and the network expects {best.name}"
    if best.swapped:
        wrong += ": red and blue are in the wrong order (BGR instead of RGB, or the other way round)"
    return [
        CHECK.finding(
            layers=(trials.layer,),
            message=(
                f"{wrong}; the inputs of {trials.layer} are {now.distance:.2g} standard deviations from its running "
                f"statistics, and would be {best.distance:.2g}"
            ),
            numbers={
                "input": now.name,
                "expected": best.name,
                "swapped": best.swapped,
                "distance": now.distance,
                "expected_distance": best.distance,
                "certainty": trials.certainty,
            },
            cost=trials.cost if trials.cost is not None and trials.cost.matters else None,
            cause="the images are not preprocessed as in training",
            remedy=f"give the network {best.name}",
        )
    ]
