"""The running statistics move other than once for each step of the optimiser.

## What it measures

train_step is run until the optimiser has made four steps (at most 32 calls), and everything is undone. For each layer
it is counted how often a forward moves the running statistics for good between two steps of the optimiser, beside
num_batches_tracked, which code that runs a forward again may restore; the median step counts. Forwards that backward
runs again, as activation checkpointing does, calls of train_step without a step of the optimiser, and
forwards with other weights within a step are told apart.

## Why it is bad

Momentum m is chosen for one move a step. Moving j times, the statistics forget as with momentum 1 - (1 - m)^j: they are
noisier than intended. A second forward may also measure what is never used: perturbed weights in sharpness-aware
minimisation (SAM), or images of another loss. With gradients of k batches accumulated, each batch still is normalised
by itself: the larger batch of the optimiser does not make the statistics more precise.

## Reported when

The statistics of a layer move other than once for each time that a forward uses it. It is advice if the cause is that
gradients are accumulated; otherwise a warning.

## Known limits

If no optimiser of torch.optim steps within train_step, each call of it is taken to be a step. Moves are seen only if
they happen in the forward of a layer. Two moves can be meant, if both forwards have images of the training. What
train_step keeps outside of the model and of the optimisers, such as the count of a scheduler, is not undone.

## Remedy

Let one forward of a step move the statistics: set momentum to 0 in the other one (as SAM implementations do), or use
checkpointing that does not move them twice, as bnlab's layers do. If they shall move j times, use the momentum
1 - (1 - m)^(1/j), which `bnlab.norm.accumulate(model, k)` does for accumulated gradients.

## References

pytorch#96136 (checkpointing moves the statistics twice); davda54/sam#17; Samudra#572; Foret et al. 2021,
"Sharpness-Aware Minimization".
"""

from typing import Any

from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import Evidence, LayerEvidence
from bnlab.health.gather.steps import LayerSteps, TrainingSteps

CHECK = Check(
    id="BN010",
    name="updates-per-step",
    severity="warn",
    stage="preview",
    safety="display only",
    needs=("train_step",),
)


def check(evidence: Evidence) -> list[Finding]:
    steps = evidence.part("train_step", TrainingSteps)
    found = {
        layer.name: (layer, steps.layers[layer.name])
        for layer in evidence.normalised
        if layer.name in steps.layers and _off(layer, steps.layers[layer.name])
    }
    if not found:
        return []
    worst, counts = max(found.values(), key=lambda pair: pair[1].moves)
    names = tuple(sorted(found, key=lambda name: -found[name][1].moves))
    causes, remedies, command = _causes(steps, counts, worst)
    accumulated = counts.moves > 1 and counts.moves == _accumulated(steps) * _uses(worst)
    unit = "step of the optimiser" if steps.optimizer_steps else "call of train_step"
    momentum, text = _momentum(worst, counts.moves / _uses(worst))
    counted = "" if counts.counted in (None, counts.moves) else f", while num_batches_tracked says {counts.counted}"
    together, batch = steps.normalised_together or steps.batch_size, steps.batch_size * max(steps.calls, 1)
    return [
        CHECK.finding(
            severity="info" if accumulated else "warn",
            layers=names,
            message=(
                f"the running statistics of {name_layers(names, of=len(evidence.normalised))} move {counts.moves} "
                f"times for each {unit}{counted}; {together} images are normalised together, and {batch} make a "
                f"step{text}"
            ),
            numbers={
                "moves": counts.moves,
                "counted": counts.counted,
                "forwards": counts.forwards,
                "again": counts.again,
                "normalised_together": together,
                "images_per_step": batch,
                **momentum,
            },
            cause=" and ".join(causes),
            remedy="; ".join(remedies),
            command=command,
        )
    ]


def _uses(layer: LayerEvidence) -> int:
    """How often one forward uses the layer; one that only training reaches, once."""
    return max(layer.calls, 1)


def _accumulated(steps: TrainingSteps) -> int:
    """How many batches make a step: calls of train_step, or parts into which it splits a batch."""
    parts = steps.forwards // max(steps.calls, 1)
    split = parts > 1 and steps.normalised_together * parts <= steps.batch_size
    return max(steps.calls, 1) * (parts if split else 1)


def _off(layer: LayerEvidence, counts: LayerSteps) -> bool:
    if layer.running_mean is None or not layer.tracks or layer.momentum == 0:
        return False
    if not counts.moves:  # restored together with the counter, it is meant
        return counts.forwards > 0 and bool(counts.counted)
    return counts.moves != _uses(layer)


def _momentum(layer: LayerEvidence, moves: float) -> tuple[dict[str, Any], str]:
    m = layer.momentum
    if m is None or not 0 < m < 1 or moves < 1:
        return {"momentum": m}, ""
    acts, instead = 1 - (1 - m) ** moves, 1 - (1 - m) ** (1 / moves)
    text = f"; momentum {m:g} acts as {acts:.3g}, and {instead:.3g} would act as {m:g}"
    return {"momentum": m, "momentum_acts_as": acts, "momentum_instead": instead}, text


def _causes(steps: TrainingSteps, counts: LayerSteps, layer: LayerEvidence) -> tuple[list[str], list[str], str]:
    if not counts.moves:
        return ["the statistics are restored, or the momentum is 0 meanwhile"], ["let a forward move them"], ""
    causes, remedies, command = [], [], ""
    k = _accumulated(steps)
    if k > 1:
        causes.append(f"gradients of {k} batches are accumulated")
        remedies.append("lower the momentum within each step")
        command = f"with bnlab.norm.accumulate(model, {k}): ..."
    if counts.again:
        causes.append("activation checkpointing runs the forward again in backward")
        remedies.append("use bnlab's layers, which do not move then, or the lower momentum")
        command = command or "bnlab.norm.convert(model)"
    elif steps.forwards > k:
        perturbed = steps.weights_changed
        causes.append(
            "a second forward with changed weights, as in sharpness-aware minimisation"
            if perturbed
            else "more than one forward for a step, such as for another loss"
        )
        remedies.append("let one forward of a step move the statistics, with momentum 0 in the others")
    if not causes:
        causes.append(f"training calls {layer.name} more often than evaluation does")
        remedies.append("use a separate layer for each use, or lower the momentum")
    return causes, remedies, command
