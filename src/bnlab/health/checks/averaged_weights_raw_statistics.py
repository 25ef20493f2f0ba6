"""An averaged model (EMA, SWA) normalises by statistics of other weights.

## What it measures

The same images are classified three times: by the averaged model as it is, by the averaged model with population
statistics that are measured with its own weights, and by the raw model, whose weights were averaged. The report gives
all three.

## Why it is bad

Averaging the weights changes what the layers put out, and so the statistics of what comes after them. The buffers of an
averaged model are the raw model's (torch's AveragedModel copies them, with use_buffers=True it averages them; some
implementations leave them as they were at the start), so evaluation normalises by the statistics of other weights.
Averaging over a long way, as SWA does, can make the averaged model useless until they are measured.

## Reported when

Accuracy by its own statistics is lower than by recalibrated ones by at least 1 percentage point (another metric: 1% of
its size), with p < 0.01 by an exact McNemar test on the same images. Without labels, when more than half of the
channels of a layer are off (see BN102).

## Known limits

Recalibrating on the images of the diagnosis can also repair a shift of the domain; the raw model then has a finding
BN102 or BN111, too. A model that averages the weights of few, near steps has statistics that are near enough.

## Remedy

Recalibrate the averaged model on 1,000 to 10,000 training images after the last update and before each validation
(`bnlab.norm.recalibrate`, or `torch.optim.swa_utils.update_bn`). The weights are not changed.

## References

Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", section 3.2; timm#245;
moco#70.
"""

from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import Evidence
from bnlab.health.gather.averaged import Averaged
from bnlab.health.statistics import OFF_SHARE, off_share

CHECK = Check(
    id="BN017",
    name="averaged-weights-raw-statistics",
    severity="warn",
    stage="preview",
    safety="safe",
    needs=("averaged",),
    images=32,
)


def check(evidence: Evidence) -> list[Finding]:
    found = evidence.part("averaged", Averaged)
    cost = None if found.scores is None else found.scores.compare("running", "population")
    shares = {name: off_share(layer) or 0.0 for name, layer in found.layers.items() if layer.family == "batch"}
    if cost is None:
        names = tuple(name for name, share in shares.items() if share > OFF_SHARE)
    else:
        names = tuple(name for name, share in shares.items() if share > 0) if cost.matters else ()
    if not names:
        return []
    names = tuple(sorted(names, key=lambda name: -shares[name]))
    means = {} if found.scores is None else found.scores.means()
    values = {"averaged": means.get("running"), "recalibrated": means.get("population"), "raw": found.raw}
    percent = cost is not None and cost.is_accuracy
    shown = ", ".join(
        f"{key} {value:.1%}" if percent else f"{key} {value:.4g}" for key, value in values.items() if value is not None
    )
    causes = {
        "the raw model's": "its running statistics are copies of the raw model's",
        "initial": "its running statistics are still the initial ones, mean 0 and variance 1",
        "others": "its running statistics were measured with other weights than the averaged ones",
    }
    cause = causes[found.buffers]
    if found.use_buffers and found.buffers == "others":
        cause = "its running statistics are averages of the raw models' (use_buffers=True), not of the averaged weights"
    return [
        CHECK.finding(
            layers=names,
            message=(
                f"the averaged model's running statistics of {name_layers(names, of=len(found.layers))} are not those "
                f"of its weights: in {names[0]}, {shares[names[0]]:.0%} of the channels are off"
                + (f"; {'accuracy' if percent else 'mean score'}: {shown}" if shown else "")
            ),
            numbers={**values, "off_share": shares[names[0]], "averaged_weights": found.weights},
            cost=cost,
            cause=cause,
            remedy="recalibrate the averaged model, also before each validation of it",
            command="bnlab.norm.recalibrate(averaged, train_loader)",
        )
    ]
