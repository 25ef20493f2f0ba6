"""The ReLU after a layer passes almost nothing of some channels.

## What it measures

For a layer that feeds a ReLU directly: the channels of which fewer than 1 in 1,000 values are positive, from gamma
and beta by the normal distribution, P = Phi(beta / |gamma|). The doctor then counts the positive outputs of these
channels over all images: a channel is dead if there are none in n values, so that with 95% confidence it passes fewer
than 3 / n. While bnlab trains, the number follows from gamma and beta alone.

## Why it is bad

Such a channel carries almost no signal and gets almost no gradient, so it does not recover. It costs time and memory.

## Reported when

More than 5% of a layer's channels are dead: advice; a warning if more than a quarter of them are. In the doctor n
must be at least 300. While bnlab trains, in layers whose gamma is trained.

## Known limits

Normalised values are not normally distributed: a channel with heavy tails may pass more, which only the count shows.
Channels that are dead for another reason than gamma and beta are not counted. Only a ReLU that follows the layer
directly counts. Other images may wake a channel.

## Remedy

In training, use a third of the learning rate, or a longer warm-up: usually one large step killed the channels. A
leaky ReLU keeps them alive (in bnlab: `learning_rate`, `warmup`, `activation=leaky_relu`). In a trained network, the
list of dead channels says what can be pruned without a change of the outputs.

## References

Lu et al. 2020, "Dying ReLU and Initialization"; Hanley & Lippman-Hand 1983, "If Nothing Goes Wrong, Is Everything All
Right?", for 3 / n.
"""

import numpy as np

from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import Evidence, LayerEvidence

CHECK = Check(id="BN109", name="dead-channels", severity="warn", stage="preview", safety="unsafe")
_CHANNELS = 0.05  # of a layer
_MANY = 0.25
_VALUES = 300  # of a channel, none of which is positive


def check(evidence: Evidence) -> list[Finding]:
    counted = {name: found for name, layer in evidence.layers.items() if (found := _counted(layer)) is not None}
    numbers = {
        name: len(counted[name]) if name in counted else layer.dead if layer.gamma_trained else 0
        for name, layer in evidence.layers.items()
    }
    failing = [layer for layer in evidence.layers.values() if numbers[layer.name] > _CHANNELS * layer.channels]
    if not failing:
        return []
    failing.sort(key=lambda layer: -numbers[layer.name] / layer.channels)
    worst, names = failing[0], tuple(layer.name for layer in failing)
    values = worst.evaluation.count if worst.name in counted and worst.evaluation is not None else None
    return [
        CHECK.finding(
            severity="warn" if numbers[worst.name] > _MANY * worst.channels else "info",
            layers=names,
            message=(
                f"the ReLU after the layer passes {'nothing' if values else 'fewer than 1 in 1,000 values'} of some "
                f"channels in {name_layers(names, of=len(evidence.layers))}, {sum(numbers[n] for n in names):,} in "
                f"all; worst layer {worst.name}: {numbers[worst.name]} of {worst.channels}"
                + (f", with no positive value in {values:,}, so fewer than 1 in {values // 3:,}" if values else "")
            ),
            numbers={
                "dead": numbers[worst.name],
                "channels": worst.channels,
                "total": sum(numbers[name] for name in names),
                "values": values,
                "at_most": 3 / values if values else None,
                "which": {name: counted[name] for name in names if name in counted},
            },
            cause="a step of the training was too large",
            remedy=(
                "use a third of the learning rate (learning_rate), a longer warm-up (warmup), or a leaky ReLU "
                "(activation=leaky_relu); or prune these channels"
            ),
        )
    ]


def _counted(layer: LayerEvidence) -> list[int] | None:
    """The channels without a positive output; None where outputs were not counted."""
    if layer.evaluation is None:
        return None
    if layer.positives is None or layer.evaluation.count < _VALUES:
        return []
    return [int(i) for i in np.flatnonzero(layer.positives == 0)]
