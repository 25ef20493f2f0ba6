"""A layer gets so few values that training and evaluation divide by different variances.

## What it measures

The number N of values that a batch gives each channel of a layer: images x positions. Training divides by the biased
variance of the batch (the sum of squares over N), while the running variance is the unbiased one (over N - 1): larger
by a factor of N / (N - 1), even if the running statistics are perfect.

## Why it is bad

Evaluation scales the layer's output down by sqrt((N - 1) / N) against training: by 2.5% for N = 20, by 13% for N = 4.
Deep in a network, such factors multiply.

## Reported when

N / (N - 1) is above 1.05 at a layer, which is N <= 20: as advice. From a factor of 1.25 on (N <= 5), as a warning.

## Known limits

The doctor's batches have to be of the size of those in training. It is known exactly, but not what it costs: a
network whose later layers do not depend on the scale loses nothing. Frozen layers and those that keep no statistics
have no such gap. Synchronised layers are left out, since their batch is that of all processes. Of ghost batch
normalisation, N is that of the full batch.

## Remedy

Train with larger batches, or put the layer before the pooling, where it has more positions: usually it is one that
follows a 1 x 1 map, as in an auxiliary or projection head. Layer normalisation does not depend on the batch.

## References

Ioffe & Szegedy 2015, Algorithm 2, step 10 (the unbiased variance in inference); Singh & Shrivastava 2019, "EvalNorm".
"""

from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import Evidence, LayerEvidence
from bnlab.health.gather.processes import Sync

CHECK = Check(
    id="BN104",
    name="bessel-gap",
    severity="info",
    stage="preview",
    safety="display only",
    needs=("batch",),
    reads=("sync",),
)
_GAP = 1.05  # N / (N - 1)
_LARGE_GAP = 1.25  # the factor from which on a variance is off


def check(evidence: Evidence) -> list[Finding]:
    synchronised = evidence.part("sync", Sync).layers if evidence.has("sync") else ()
    layers = [layer for layer in evidence.normalised if layer.usable and not layer.frozen]
    values = {layer.name: _values(layer, evidence) for layer in layers if layer.name not in synchronised}
    few = {name: n for name, n in values.items() if n is not None and n > 1 and n / (n - 1) > _GAP}
    if not few:
        return []
    names = tuple(sorted(few, key=lambda name: few[name]))
    worst, n = names[0], few[names[0]]
    return [
        CHECK.finding(
            severity="warn" if n / (n - 1) >= _LARGE_GAP else "info",
            layers=names,
            message=(
                f"a batch gives {n} values a channel in {worst or 'the model itself'}, so that the running variance is "
                f"larger by a factor of {n / (n - 1):.3g} than the one that training divides by; at most "
                f"{max(few.values())} values in {name_layers(names, of=len(evidence.normalised))}"
            ),
            numbers={"values": n, "factor": n / (n - 1)},
            cause=f"batches of {evidence.batch_size} images, and few positions",
            remedy="train with larger batches, or put the layer where it has more positions, as before the pooling",
        )
    ]


def _values(layer: LayerEvidence, evidence: Evidence) -> int | None:
    """Values of each channel in a batch of the usual size, at one call."""
    if layer.values_per_image is None or not layer.calls:
        return None
    # a layer may get several rows of each image, which the number of positions does not show
    measured = layer.batch.count / evidence.images / layer.calls if layer.batch is not None and evidence.images else 0
    return round(evidence.batch_size * max(measured, layer.values_per_image))
