"""A constant or the scales of the layers were lost when the weights were moved from another framework.

## What it measures

The first layer's input depends on no eps, the inputs of all later layers do. If the first fits its running statistics
(within 0.15 standard deviations: Wasserstein-2 distance, averaged over channels) and the later ones do not (0.1 or
more in their median), 64 images are run with eps at 1e-5, 1e-3, 1e-2 and 1e-1 in all layers. Besides, it is seen
whether all gammas are exactly 1 while betas are not 0.

## Why it is bad

Where variances are small, eps is part of what was trained: with another one, the channels have another scale.
A gamma that was not imported scales every channel wrongly.

## Reported when

WARN: with another eps, the distance of the later layers is at most a third of what it is now, and at most 0.2; or at
most a tenth of what it is now, and at most 1, since deep layers of a few values fit less by chance. INFO: in all
layers with gamma and beta, gamma is exactly 1, and in half of them or more some beta is not 0.

## Known limits

An eps that changes the layers' outputs little is not seen, and does no harm. Layers with different eps are not told
apart: one value is tried for all of them. Gammas of 1 are right where the network was trained without (scale=False in
Keras and TF-Slim, fix_gamma in MXNet).

## Remedy

Set eps to the value of the original framework: 1e-5 in PyTorch, 1e-3 in TensorFlow and Keras. Import gamma, which
other frameworks call scale.

## References

The defaults of torch.nn.BatchNorm2d, tf.keras.layers.BatchNormalization and mxnet's BatchNorm (fix_gamma).
"""

from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import Evidence
from bnlab.health.gather.inputs import Trials

CHECK = Check(
    id="BN026",
    name="lost-eps-or-gamma",
    severity="warn",
    stage="preview",
    safety="unsafe",
    reads=("eps",),
)
_OFF = 0.1
_FITS = ((0.2, 3.0), (1.0, 10.0))  # either: at most this distance, and less than now by this factor
_LIKE = 1.3  # times the best distance: as good as the best


def check(evidence: Evidence) -> list[Finding]:
    return [*_eps(evidence), *_gamma(evidence)]


def _eps(evidence: Evidence) -> list[Finding]:
    if not evidence.has("eps"):
        return []
    trials = evidence.part("eps", Trials)
    best, now = trials.best, trials.present
    if best is None or now.distance < _OFF:
        return []
    if not any(best.distance <= limit and now.distance >= ratio * best.distance for limit, ratio in _FITS):
        return []
    like = sorted(t.value for t in trials.others if t.distance <= _LIKE * best.distance)
    cost = trials.cost if trials.cost is not None and trials.cost.matters else None
    return [
        CHECK.finding(
            layers=tuple(layer.name for layer in evidence.normalised),
            message=(
                f"with eps {best.name} instead of {now.name}, the layers' inputs are {best.distance:.2g} standard "
                f"deviations from the running statistics in the median layer, and now they are {now.distance:.2g}"
            ),
            numbers={"eps": now.value, "expected": best.value, "like": like}
            | {"distance": now.distance, "expected_distance": best.distance},
            cost=cost,
            cause="the network was trained with another eps, as after an import from another framework",
            remedy=f"set eps to {best.name} in all layers",
            command=f"bnlab.health.repair(model, batches, [bnlab.health.repairs.set_eps({best.value:g})])",
        )
    ]


def _gamma(evidence: Evidence) -> list[Finding]:
    both = [layer for layer in evidence.normalised if layer.gamma is not None and layer.beta is not None]
    shifted = [layer for layer in both if layer.beta is not None and (layer.beta != 0).any()]
    plain = all(layer.gamma is not None and (layer.gamma == 1).all() for layer in both)
    if not shifted or not plain or 2 * len(shifted) < len(both):
        return []
    names = tuple(layer.name for layer in shifted)
    return [
        CHECK.finding(
            severity="info",
            layers=names,
            message=f"all gammas are exactly 1, although the betas of {name_layers(names)} are not 0",
            numbers={"layers": len(both), "shifted": len(shifted)},
            cause="the gammas were not imported, or the network was trained without",
            remedy="import the gammas (scales) of the original, if it has some",
        )
    ]
