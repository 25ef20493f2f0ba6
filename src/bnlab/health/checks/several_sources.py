"""One layer normalises images of several sources, whose statistics differ.

## What it measures

The images of each source that the caller names (`sources`), run with the network as in evaluation: at each layer, how
far the mean of a source is from the mean of all images, in their standard deviation. A channel is off if that is more
than 0.1, and if chance does not explain how far the source is from the other images, by the variance between images
(1% of the channels at most by chance, Benjamini & Hochberg 1995, divided by the number of layers and sources). If
sources differ and there are labels, population statistics are measured of all images and of each source, and the
images are classified by both.

## Why it is bad

In training, batches of one source are normalised by the statistics of that source (real and generated images, source
and target domain, time steps), while the running statistics are an average that fits none of them. Where sources are
mixed in a batch, the layer cannot remove what differs between them.

## Reported when

More than half of the channels of a layer are off. It is a warning if accuracy by each source's population statistics
is higher than by those of all images by at least 1 percentage point (another metric: 1% of its size), with p < 0.01
by an exact McNemar test on the same images, or if there are no labels; else it is advice.

## Known limits

Sources with fewer than 16 images are left out, and so are layers that are called several times in a forward. Sources
whose variances differ but not their means are not reported. If classes are not equally frequent in all sources,
statistics of each source take away a part of what tells the classes apart.

## Remedy

Keep statistics of each source, with shared gamma and beta, by which each image is normalised; or let every batch hold
all sources in the same shares, in one forward.

## References

Li et al. 2016, "Revisiting Batch Normalization For Practical Domain Adaptation"; Chang et al. 2019, "Domain-Specific
Batch Normalization for Unsupervised Domain Adaptation"; Xie et al. 2020, "Adversarial Examples Improve Image
Recognition".
"""

from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import Evidence
from bnlab.health.gather.sources import Sources

CHECK = Check(
    id="BN023",
    name="several-sources",
    severity="warn",
    stage="preview",
    safety="unsafe",
    needs=("sources", "running"),
    images=32,
)
_SHARE = 0.5  # of a layer's channels


def check(evidence: Evidence) -> list[Finding]:
    sources = evidence.part("sources", Sources)
    shares = {name: float(off.mean()) for name, off in sources.off.items()}
    failing = tuple(sorted((n for n in shares if shares[n] > _SHARE), key=lambda name: -shares[name]))
    if not failing:
        return []
    worst = failing[0]
    far = float(sources.distances[worst].max())
    costs = sources.cost is None or sources.cost.matters
    counts = ", ".join(f"{source}: {number}" for source, number in sources.images.items())
    return [
        CHECK.finding(
            severity="warn" if costs else "info",
            layers=failing,
            message=(
                f"images of {len(sources.images)} sources ({counts} images) differ in "
                f"{name_layers(failing, of=len(evidence.normalised))}; in {worst or 'the model itself'}, the means of "
                f"{shares[worst]:.0%} of the channels are off, by up to {far:.2g} standard deviations"
            ),
            numbers={"sources": dict(sources.images), "off_share": shares[worst], "mean_off": far},
            cost=sources.cost,
            cause="one set of running statistics for sources that differ",
            remedy=(
                "keep separate statistics for each source, with shared gamma and beta"
                if costs
                else "none is needed for accuracy: statistics of each source do not raise it"
            ),
        )
    ]
