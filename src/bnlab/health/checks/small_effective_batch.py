"""A batch is worth few independent values at a layer, so that its statistics are noisy.

## What it measures

How many independent values the batch statistics of a layer are worth: N_eff = variance of the values / variance
between batches of the batch mean, averaged over the channels. Pixels of one image are correlated, so N_eff is far
below N x H x W.

The doctor measures it over the batches that it gets. The 95% interval follows from the chi-square distribution with
(K - 1) degrees of freedom for each independent channel, for K batches; correlated channels count as fewer
(Satterthwaite 1946). While bnlab trains, N_eff is measured over windows of 8 successive steps in 64: the batch means
follow from the movement of the running statistics, and the variance between them is half the mean squared successive
difference.

## Why it is bad

The relative error of a batch's mean is about 1 / sqrt(N_eff) standard deviations. Training then optimises a noisier
function than the one that inference computes.

## Reported when

The upper end of the 95% interval is below 32, over at least 8 batches. By the doctor only if its batches have fewer
than 32 images: N_eff of independent images cannot be smaller than their number, and images that are not independent
are reported by BN105.

## Known limits

The doctor's batches have to be of the size of those in training, and shuffled; if they are sorted by class, nothing
is reported. Synchronised layers are left out, since their batch is that of all processes, as are frozen layers. Of
ghost batch normalisation, N_eff is that of the full batch. While bnlab trains, weights move within a window, and what
the differences do not cancel of it makes N_eff too low; with activation checkpointing, which moves the statistics
twice by one batch, it is up to 2 times too low; with synchronised layers it is that of all processes; whitening
layers are not measured, nor are channels whose statistics are lost in rounding (half precision, a mean far from 0).

## Remedy

Train with larger batches (`batch_size`), synchronise the layers where several processes train
(`bnlab.norm.convert_sync`, `norm=sync`), or freeze the statistics: in fine-tuning (`freeze_bn=true` with `init`), or
for the last epochs. Group normalisation does not depend on the batch.

## References

von Neumann 1941, "Distribution of the Ratio of the Mean Square Successive Difference to the Variance"; Ioffe 2017,
"Batch Renormalization", on small batches; Wu & He 2018, "Group Normalization".
"""

from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import SAMPLED_BATCHES, Evidence, LayerEvidence
from bnlab.health.gather.processes import Sync
from bnlab.health.statistics import effective_batch

CHECK = Check(
    id="BN103",
    name="small-effective-batch",
    severity="warn",
    stage="preview",
    safety="unsafe",
    needs=("effective_batch",),
    reads=("sync",),
)
_EFFECTIVE_BATCH = 32  # values


def check(evidence: Evidence) -> list[Finding]:
    synchronised = evidence.part("sync", Sync).layers if evidence.has("sync") else ()
    layers = [layer for layer in evidence.normalised if not layer.frozen]
    found = {layer.name: _measured(layer, evidence, layer.name in synchronised) for layer in layers}
    small = {name: value for name, value in found.items() if value is not None and value[1] < _EFFECTIVE_BATCH}
    if not small:
        return []
    names = tuple(sorted(small, key=lambda name: small[name]))
    worst = evidence.layers[names[0]]
    size, at_most = small[worst.name]
    batches = worst.batch.batches if worst.batch is not None else worst.sampled
    return [
        CHECK.finding(
            layers=names,
            message=(
                f"a batch is worth fewer than {_EFFECTIVE_BATCH} independent values in "
                f"{name_layers(names, of=len(evidence.normalised))}, so that batch statistics are noisy; in "
                f"{worst.name or 'the model itself'}, {size:.1f}, at most {at_most:.1f}, over {batches} batches"
            ),
            numbers={"effective_batch": size, "at_most": at_most, "batches": batches},
            cause=(
                f"batches of {evidence.batch_size} images"
                if worst.batch is not None
                else "the batches are small, or their images are alike"
            ),
            remedy=(
                "train with larger batches (batch_size), synchronise the layers where several processes train "
                "(norm=sync), or freeze the statistics in fine-tuning (freeze_bn=true)"
            ),
        )
    ]


def _measured(layer: LayerEvidence, evidence: Evidence, synchronised: bool) -> tuple[float, float] | None:
    """N_eff and the upper end of its interval, where they can be judged."""
    if layer.batch is None:  # by the monitor of a training
        if layer.effective_batch is None or layer.effective_batch_at_most is None or layer.sampled < SAMPLED_BATCHES:
            return None
        return layer.effective_batch, layer.effective_batch_at_most
    if layer.batch.batches < SAMPLED_BATCHES or evidence.batch_size >= _EFFECTIVE_BATCH:
        return None
    return None if synchronised or evidence.sorted_by_class else effective_batch(layer.batch, layer.eps)
