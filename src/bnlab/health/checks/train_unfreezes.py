"""Layers were frozen by setting them to evaluation, which the next model.train() undoes.

## What it measures

The modes of the layers before and after model.train(), if the model was passed in training mode. With train_step, also
in which mode it ran the layers. Both are undone.

## Why it is bad

train() sets every module to training, also those that were set to evaluation to keep their statistics. Most trainings
call it at the start of every epoch, so that the layers are frozen in the first epoch alone, and nothing says so.

## Reported when

A layer that keeps statistics, and is reached, was in evaluation while the model was in training, and is in training
after model.train(). It is advice if train_step ran the layer in evaluation; otherwise a warning.

## Known limits

A model that is passed in evaluation mode does not show what its training freezes. A training may set the layers to
evaluation again after each train(), which is not seen without a train_step that does so.

## Remedy

Freeze the layers so that train() does not undo it: `bnlab.norm.freeze(model)`, or of a part of the model. Or override
train() of the model so that it sets them to evaluation again.

## References

Lightning#15063; the documentation of torch.nn.Module.train; torchvision's FrozenBatchNorm2d, made for this reason.
"""

from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import Evidence
from bnlab.health.gather.modes import TrainMode
from bnlab.health.gather.steps import TrainingSteps

CHECK = Check(
    id="BN005",
    name="train-unfreezes",
    severity="warn",
    stage="preview",
    safety="unsafe",
    needs=("train_mode",),
    reads=("train_step",),
)


def check(evidence: Evidence) -> list[Finding]:
    undone = evidence.part("train_mode", TrainMode).undone
    layers = [name for name in undone if evidence.layers[name].calls and not evidence.layers[name].frozen]
    if not layers:
        return []
    steps = evidence.parts.get("train_step")
    assert steps is None or isinstance(steps, TrainingSteps)
    kept = steps is not None and all(name in steps.evaluated for name in layers)
    unfrozen = steps is not None and any(name in steps.layers for name in layers)
    more = "; train_step ran them in evaluation" if kept else "; train_step ran them in training mode" * unfrozen
    return [
        CHECK.finding(
            severity="info" if kept else "warn",
            layers=tuple(layers),
            message=(
                f"{name_layers(layers, of=len(evidence.layers))} in evaluation while the model is in training, and "
                f"in training mode after model.train(){more}"
            ),
            numbers={"held": len(evidence.part("train_mode", TrainMode).held), "undone": len(layers)},
            cause="the layers are frozen by their mode, and train() sets the mode of every module",
            remedy="freeze the layers so that train() does not undo it",
            command="bnlab.norm.freeze(model)",
        )
    ]
