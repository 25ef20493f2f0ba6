"""The running statistics are the plain average over a whole training: the first weights are never forgotten.

## What it measures

Whether layers have momentum=None, with which torch averages all batches since the start with equal weights. And
whether that matters: whether the running statistics are those of the images, or the training goes on.

## Why it is bad

During a training the weights change, and so do the statistics. A plain average keeps those of all weights there have
been: after n batches the last one has a weight of 1 / n. It is right for the statistics of fixed weights, as after
weight averaging, and wrong for a training.

## Reported when

After at least 100 batches, more than half of the channels of such a layer are off: the running mean by more than 0.1
population standard deviations, or the running variance by more than a factor of 1.25. And accuracy by the running
statistics is lower than by population statistics by at least 1 percentage point (another metric: 1% of its size),
with p < 0.01 by an exact McNemar test on the same images, or there are no labels. That is a warning. It is advice if
the statistics are right, but the caller passes an optimiser or a training step, so that the training goes on.

## Known limits

If the images are not like those of the training, the statistics are off for that reason: see BN111. Statistics that
were measured with fixed weights, as by torch.optim.swa_utils.update_bn, fit and are not reported.

## Remedy

Recalibrate at the end of the training, or train with momentum 0.1.

## References

PyTorch, torch.nn.BatchNorm2d, the argument momentum; Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima
and Better Generalization", section 3.2, where it is right.
"""

from bnlab.health.check import RECALIBRATE, Check, Finding, name_layers
from bnlab.health.evidence import Evidence, LayerEvidence, distances, is_off

CHECK = Check(
    id="BN028",
    name="cumulative-average",
    severity="warn",
    stage="preview",
    safety="safe",
    reads=("optimizer", "train_step"),
)
_OFF_SHARE = 0.5  # of a layer's channels
_UPDATES = 100
_MOMENTUM = 'for m in model.modules(): hasattr(m, "momentum") and setattr(m, "momentum", 0.1)'


def check(evidence: Evidence) -> list[Finding]:
    layers = [
        layer
        for layer in evidence.normalised
        if layer.momentum is None and layer.tracks and not layer.frozen and layer.running_mean is not None
    ]
    shares = {layer.name: share for layer in layers if (share := _off_share(layer)) is not None}
    off = [layer for layer in layers if shares.get(layer.name, 0) > _OFF_SHARE and (layer.updates or 0) >= _UPDATES]
    cost = evidence.scores.compare("running", "population") if evidence.scores else None
    if off and (cost is None or cost.matters):
        off.sort(key=lambda layer: -shares[layer.name])
        worst, names = off[0], tuple(layer.name for layer in off)
        return [
            CHECK.finding(
                layers=names,
                message=(
                    f"momentum=None averages all batches equally, and the running statistics of "
                    f"{name_layers(names, of=len(evidence.normalised))} are not those of the images; in {worst.name}, "
                    f"{shares[worst.name]:.0%} of the channels are off after {worst.updates:,} batches"
                ),
                numbers={"off_share": shares[worst.name], "updates": worst.updates},
                cost=cost,
                cause="the average goes over a training in which the weights changed",
                remedy="recalibrate; in training, set the momentum to 0.1",
                command=RECALIBRATE,
            )
        ]
    if layers and (evidence.has("optimizer") or evidence.has("train_step")):
        names = tuple(layer.name for layer in layers)
        return [
            CHECK.finding(
                severity="info",
                layers=names,
                message=(
                    f"momentum=None averages all batches of the training equally in "
                    f"{name_layers(names, of=len(evidence.normalised))}: what the first weights gave is not forgotten"
                ),
                numbers={"updates": max(layer.updates or 0 for layer in layers)},
                cause="momentum=None was set, or left behind by a recalibration",
                remedy="set the momentum to 0.1, or recalibrate at the end of the training",
                safety="unsafe",
                command=_MOMENTUM,
            )
        ]
    return []


def _off_share(layer: LayerEvidence) -> float | None:
    if layer.batch is None or layer.running_mean is None or layer.running_variance is None:
        return layer.off_share
    sample = layer.batch
    found = distances(layer.running_mean, layer.running_variance, sample.mean, sample.variance, layer.eps)
    return float(is_off(*found).mean())
