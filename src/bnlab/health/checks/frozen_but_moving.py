"""A layer's weights are frozen, but training still moves its running statistics.

## What it measures

Whether the gamma and beta of a layer are trained (requires_grad), and whether a training step moves the layer's running
statistics: a step of train_step if it is passed, otherwise one forward of 16 images after model.train(). Both are
undone.

## Why it is bad

Gamma and beta were trained for the inputs normalised by the running statistics of that time. If these follow other
images, or the noise of small batches, the frozen part no longer computes what it did, in evaluation at the latest.
In training, it normalises by the batch, and so never computed that.

## Reported when

A layer has a gamma or a beta, none of them is trained, and its statistics moved. Without train_step, just if other
parameters of the model are trained: otherwise nothing says that it is going to be trained at all.

## Known limits

Statistics may be meant to move although the weights are frozen, to adapt to another domain. Without train_step, the
doctor calls model.train() as a training does; a training that sets the frozen layers to evaluation after each train()
is not known. Layers without gamma and beta are not judged.

## Remedy

Freeze the statistics as well, so that a later train() does not undo it: `bnlab.norm.freeze(model)`, or of a part of the
model; `bnlab.norm.unfreeze` undoes it.

## References

Lightning#15063 and gt-pyg#112 (frozen layers whose statistics move); Keras, "Transfer learning and fine-tuning" (a
frozen BatchNormalization runs in inference mode).
"""

from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import Evidence, LayerEvidence
from bnlab.health.gather.modes import Modes
from bnlab.health.gather.steps import TrainingSteps

CHECK = Check(
    id="BN004",
    name="frozen-but-moving",
    severity="warn",
    stage="preview",
    safety="unsafe",
    needs=("modes", "training"),
)


def check(evidence: Evidence) -> list[Finding]:
    steps = evidence.part("training", TrainingSteps)
    layers = [
        layer.name
        for layer in evidence.normalised
        if layer.name in steps.layers and steps.layers[layer.name].moves and _is_frozen(layer)
    ]
    if not layers or not (steps.by_train_step or evidence.part("modes", Modes).trained):
        return []
    step = "a training step" if steps.by_train_step else "a forward after model.train()"
    return [
        CHECK.finding(
            layers=tuple(layers),
            message=(
                f"gamma and beta of {name_layers(layers, of=len(evidence.normalised))} are not trained, but {step} "
                "moves the running statistics"
            ),
            numbers={"moving": len(layers), "of": len(evidence.normalised)},
            cause="requires_grad=False stops the weights alone; the statistics move in training mode",
            remedy="freeze the statistics too, so that a later train() does not undo it",
            command="bnlab.norm.freeze(model)",
        )
    ]


def _is_frozen(layer: LayerEvidence) -> bool:
    affine = layer.gamma is not None or layer.beta is not None
    return affine and not layer.gamma_trained and not layer.beta_trained
