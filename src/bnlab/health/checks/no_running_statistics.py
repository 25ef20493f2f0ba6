"""A batch normalisation layer has no running statistics, or does not update those that it has.

## What it measures

Whether each batch normalisation layer that a forward reaches has a running mean and variance, and whether
track_running_stats is on.

## Why it is bad

Without running statistics, a layer normalises by the batch in evaluation too: the prediction for an image depends on
which images are with it, and a single image may be refused. With track_running_stats=False and running statistics
nonetheless, training does not move them but evaluation uses them: if they still are the initial mean 0 and variance 1,
evaluation runs another function than training.

## Reported when

Some layers have no running statistics while others do, or a layer does not update statistics that are still the initial
ones: an error. If no layer has running statistics, or if a layer does not update statistics that are not the initial
ones: a warning.

## Known limits

The check cannot know what is meant: normalising by the batch in evaluation is intended in some generative networks and
in test-time adaptation. Setting track_running_stats to False is also used to stop the statistics from moving, which
it does, while training still normalises by the batch.

## Remedy

Make the layers with track_running_stats=True and recalibrate, which measures the statistics without training; to stop
statistics from moving, freeze the layers instead (`bnlab.norm.freeze`). Predictions change.

## References

Ioffe & Szegedy 2015, section 3.1; documentation of torch.nn.BatchNorm2d, track_running_stats.
"""

import numpy as np

from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import Evidence, LayerEvidence

CHECK = Check(id="BN003", name="no-running-statistics", severity="error", stage="preview", safety="unsafe")


def check(evidence: Evidence) -> list[Finding]:
    reached = [layer for layer in evidence.normalised if layer.calls and not layer.frozen]
    without = [layer.name for layer in reached if layer.running_mean is None]
    standing = [layer for layer in reached if layer.running_mean is not None and not layer.tracks]
    found = []
    if without:
        alike = len(without) == len(reached)
        found.append(
            CHECK.finding(
                severity="warn" if alike else "error",
                layers=tuple(without),
                message=(
                    f"{name_layers(without, of=len(reached))} without running statistics: evaluation normalises by the "
                    "batch, so that a prediction depends on which images are in it"
                ),
                numbers={"without": len(without), "of": len(reached)},
                cause=(
                    "the model is made with track_running_stats=False"
                    if alike
                    else "some layers were made with track_running_stats=False, or their buffers were removed"
                ),
                remedy="if that is not meant, turn track_running_stats on and recalibrate",
                command="BatchNorm2d(channels, track_running_stats=True)",
            )
        )
    if standing:
        initial = [layer.name for layer in standing if _is_initial(layer)]
        names = initial or [layer.name for layer in standing]
        state = "are the initial mean 0 and variance 1" if initial else "stand still"
        found.append(
            CHECK.finding(
                severity="error" if initial else "warn",
                layers=tuple(names),
                message=(
                    f"the running statistics of {name_layers(names, of=len(reached))} {state}, because "
                    "track_running_stats is off: training does not move them, but evaluation normalises by them"
                ),
                numbers={"standing": len(standing), "initial": len(initial), "of": len(reached)},
                cause="track_running_stats was set to False after the layers were made",
                remedy="turn track_running_stats on and recalibrate; to stop statistics from moving, freeze the layers",
                command="layer.track_running_stats = True",
            )
        )
    return found


def _is_initial(layer: LayerEvidence) -> bool:
    mean, variance = layer.running_mean, layer.running_variance
    return mean is not None and variance is not None and not np.any(mean) and bool(np.all(variance == 1))
