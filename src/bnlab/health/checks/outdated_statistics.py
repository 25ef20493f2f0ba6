"""The weights were changed after the statistics were measured: pruned, quantised, averaged, or trained on.

## What it measures

Whether a layer of bnlab with statistics="population" marks them as outdated, which a training step does; and whether
the network shows that its weights were changed: masks of torch.nn.utils.prune that remove weights, fake-quantised
weights (torch.ao.quantization), or a torch AveragedModel of more than one set of weights. The latter do not say when
the statistics were measured, so they count only if the statistics are not those of the weights, as BN102 measures it.

## Why it is bad

Statistics hold for the weights with which they were measured. Pruning or quantising changes what a layer puts out, and
the layers after it normalise by the means and variances of before. What is lost by that is often most of what is lost
at all, and recalibration alone brings it back.

## Reported when

An error, if a layer marks its statistics as outdated: bnlab refuses to use them. A warning, if weights were changed,
more than 10% of the channels of a layer are off (see BN102), and accuracy by running statistics is lower than by
population statistics by at least 1 percentage point (another metric: 1% of its size) with p < 0.01 by an exact McNemar
test; without labels, if more than half of the channels of a layer are off.

## Known limits

Changes that leave no trace are not seen: masks that were made permanent (prune.remove), weights that were merged or
loaded, quantised tensors of other libraries. See BN102, which reports what they cost. BN102 also reports the same
layers.

## Remedy

Recalibrate after each change of the weights that is not a training step. The weights are not changed.

## References

Li et al. 2020, "EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning" (recalibrate before comparing);
Sun et al. 2019, "Hybrid 8-bit Floating Point Training and Inference for Deep Neural Networks", section 3 (re-tuning of
statistics after quantisation); NNCF PR#41 (14.0 to 65.2% by recalibration alone).
"""

from collections.abc import Mapping

from bnlab.errors import plural
from bnlab.health.check import RECALIBRATE, Check, Finding, name_layers
from bnlab.health.evidence import Evidence
from bnlab.health.gather.outdated import Outdated
from bnlab.health.statistics import OFF_SHARE, OFF_SHARE_OF_COST, off_share

CHECK = Check(
    id="BN027", name="outdated-statistics", severity="error", stage="preview", safety="safe", needs=("outdated",)
)


def check(evidence: Evidence) -> list[Finding]:
    marked = tuple(layer.name for layer in evidence.layers.values() if layer.outdated)
    if marked:
        return [
            CHECK.finding(
                layers=marked,
                message=f"{name_layers(marked, of=len(evidence.layers))} have population statistics that are marked as "
                "those of earlier weights",
                cause="the network was trained on after it was recalibrated, or never recalibrated",
                remedy="recalibrate; until then inference is refused",
                command=RECALIBRATE,
            )
        ]
    changed = evidence.part("outdated", Outdated).changed
    return _confirmed(evidence, changed) if changed else []


def _confirmed(evidence: Evidence, changed: Mapping[str, str]) -> list[Finding]:
    cost = evidence.scores.compare("running", "population") if evidence.scores else None
    threshold = OFF_SHARE if cost is None else OFF_SHARE_OF_COST
    shares = {layer.name: off_share(layer) or 0.0 for layer in evidence.normalised}
    names = tuple(sorted((n for n, share in shares.items() if share > threshold), key=lambda name: -shares[name]))
    if not names or (cost is not None and not cost.matters):
        return []
    first, what = next(iter(changed.items()))
    more = f" and {plural(len(changed) - 1, 'other module')}" if len(changed) > 1 else ""
    return [
        CHECK.finding(
            severity="warn",
            layers=names,
            message=f"{first or 'the model itself'} was {what}{more}, and the running statistics of "
            f"{name_layers(names, of=len(evidence.normalised))} are not those of these weights: in {names[0]}, "
            f"{shares[names[0]]:.0%} of the channels are off",
            numbers={"changed": dict(changed), "off_share": shares[names[0]]},
            cost=cost,
            cause="the weights were changed after the statistics were measured",
            remedy="recalibrate after each change of the weights",
            command=RECALIBRATE,
        )
    ]
