"""Instance normalisation with tracking: evaluation normalises by an average over images, as training never does.

## What it measures

Whether layers of instance normalisation have track_running_stats=True and statistics. If all layers of the model that
keep statistics are such, also the scores of the same images by the statistics of each image and by the running ones.

## Why it is bad

Instance normalisation removes the contrast and the mean of each image by itself. With tracking, it does so in
training only: in evaluation each image keeps its own. The network runs on inputs that it has never seen. torch's
default is False.

## Reported when

There is such a layer: a warning. An error if accuracy by running statistics is lower by at least 1 percentage point
(another metric: 1% of its size), with p < 0.01 by an exact McNemar test on the same images.

## Known limits

In a model that has batch normalisation, too, the cost is not measured, since both kinds change together.

## Remedy

Set track_running_stats=False and drop the buffers. If the running statistics are wanted, use batch normalisation.

## References

Ulyanov et al. 2016, "Instance Normalization: The Missing Ingredient for Fast Stylization", section 2: it is applied
in evaluation, too; PyTorch, torch.nn.InstanceNorm2d, the note on track_running_stats.
"""

from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import Evidence

CHECK = Check(id="BN024", name="instance-norm-tracking", severity="warn", stage="preview", safety="unsafe")


def check(evidence: Evidence) -> list[Finding]:
    layers = [layer for layer in evidence.layers.values() if layer.family == "instance"]
    names = tuple(layer.name for layer in layers if layer.tracks and layer.running_mean is not None)
    if not names:
        return []
    alone = all(layer.family in ("instance", "frozen") for layer in evidence.layers.values())
    cost = evidence.scores.compare("running", "batch") if alone and evidence.scores else None
    costs = cost is not None and cost.matters
    return [
        CHECK.finding(
            severity="error" if costs else "warn",
            layers=names,
            message=(
                f"in evaluation, {name_layers(names, of=len(layers))} of instance normalisation use running statistics "
                "over all images, in training those of each image"
            ),
            numbers={"layers": len(names)},
            cost=cost if costs else None,
            cause="track_running_stats=True, which is not the default",
            remedy="set track_running_stats=False, and drop the buffers",
            command=(
                "for m in model.modules(): isinstance(m, torch.nn.modules.instancenorm._InstanceNorm) and "
                "setattr(m, 'track_running_stats', False)"
            ),
        )
    ]
