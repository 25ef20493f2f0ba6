"""A module is in training mode where the model is evaluated.

## What it measures

The modes of the modules when the model was passed and, if validate was passed, while it runs. Four images are run in a
batch, twice, and one by one, in the modes in which the model was passed, in float64 on a copy; the differences of the
outputs are given in standard deviations of the outputs.

## Why it is bad

A normalisation layer in training mode normalises each image by the batch that it is in, and moves its running
statistics with each batch that is evaluated: predictions depend on the company, and spoil the later ones. Dropout in
training mode makes predictions random.

## Reported when

A layer with running statistics is reached in training mode although the model is in evaluation, or while validate runs:
an error. Outputs of the same batch differ between two runs by more than 1e-5 standard deviations (1e-3 where float64
does not work, as of the next), because a module that drops values is in training mode, or a function does so whatever
the mode is: a warning. A module that drops values runs in training mode while validate runs: a warning. Outputs of an
image in a batch and by itself differ by more than 1e-5, every layer has running statistics and is in evaluation, and
F.batch_norm is called outside of the layers: a warning. The model was passed in training mode with such layers, and
neither train_step nor validate: a warning.

## Known limits

Randomness may be meant, as in Monte Carlo dropout, and training mode too, as in test-time adaptation. If outputs cannot
be compared (no tensor with a row for each image), modules that drop values are reported by their mode alone. What
code of the caller's does between the doctor's forwards is not seen without validate.

## Remedy

Call model.eval() before evaluation, and find the code that sets the named modules back: a callback, a train() of the
caller's own, or functions such as F.dropout(x), which drops values unless it gets training=self.training.

## References

pytorch#4741 and pytorch#5406 (evaluation far worse than training); Gal & Ghahramani 2016, "Dropout as a Bayesian
Approximation" (Monte Carlo dropout).
"""

from typing import Any

from bnlab.errors import plural
from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import Evidence, LayerEvidence
from bnlab.health.gather.modes import Alone, Modes, Validation
from bnlab.health.gather.trace import Trace

CHECK = Check(
    id="BN002",
    name="training-in-evaluation",
    severity="error",
    stage="preview",
    safety="display only",
    needs=("modes",),
    reads=("alone", "hidden", "validation", "train_step"),
)
_FOUND_CAUSE = "code that calls train() on a part of the model, or evaluates before it calls eval()"


def check(evidence: Evidence) -> list[Finding]:
    alone = evidence.parts.get("alone")
    assert alone is None or isinstance(alone, Alone)
    found = _passed_in_training(evidence) if evidence.root_training else _in_evaluation(evidence, alone)
    return found + _while_validating(evidence)


def _passed_in_training(evidence: Evidence) -> list[Finding]:
    layers = [layer.name for layer in evidence.layers.values() if _normalises_by_batch(layer)]
    if not layers or evidence.has("train_step") or evidence.has("validation"):
        return []
    return [
        _finding(
            layers,
            f"the model was passed in training mode, and so were {name_layers(layers, of=len(evidence.layers))}; the "
            "doctor has evaluated it in evaluation mode",
            severity="warn",
            cause="eval() was not called before the diagnosis and perhaps is not called before evaluation either",
        )
    ]


def _in_evaluation(evidence: Evidence, alone: Alone | None) -> list[Finding]:
    found = []
    layers = [layer.name for layer in evidence.layers.values() if _normalises_by_batch(layer)]
    numbers = {} if alone is None else {"alone": alone.alone, "again": alone.again, "images": alone.images}
    if layers:
        shown = "" if alone is None or alone.alone is None else f"; outputs of single images differ {_by(alone.alone)}"
        found.append(
            _finding(
                layers,
                f"{name_layers(layers, of=len(evidence.layers))} in training mode although the model is in evaluation"
                f"{shown and shown + ' from those in a batch'}",
                numbers=numbers,
            )
        )
    random = evidence.part("modes", Modes).random
    if alone.is_random if alone is not None else random:
        by_mode = alone is None or alone.again_in_evaluation <= alone.limit
        where = _modules(random) if random else "a function or a module of the caller's own"
        shown = "" if alone is None else f": two runs of the same {alone.images} images differ {_by(alone.again)}"
        found.append(
            _finding(
                [],
                f"evaluation is random{shown}; {where} drops values in training mode"
                if by_mode
                else f"evaluation is random{shown}, also with every module in evaluation",
                severity="warn",
                numbers=numbers | {"modules": list(random)},
                cause=_FOUND_CAUSE if by_mode else "a function that drops values whatever the mode is, as F.dropout(x)",
                remedy="call model.eval() before evaluation" if by_mode else "pass training=self.training to it",
                command="model.eval()" if by_mode else "F.dropout(x, p, training=self.training)",
            )
        )
    elif not layers and alone is not None and alone.depends_on_batch and alone.alone is not None:
        hidden = evidence.parts.get("hidden")
        explained = any(layer.running_mean is None and layer.calls for layer in evidence.normalised)
        owners = dict.fromkeys(one.owner for one in hidden.hidden if one.by_batch) if isinstance(hidden, Trace) else {}
        if owners and not explained:
            modules = [name or "the model itself" for name in owners]
            found.append(
                _finding(
                    [],
                    f"outputs of single images differ {_by(alone.alone)} from those in a batch, although every layer "
                    f"is in evaluation; batch_norm is called by the forward of {', '.join(modules[:8])}",
                    severity="warn",
                    numbers=numbers | {"modules": modules},
                    cause="a batch_norm function that normalises by the batch whatever the mode is",
                    remedy="pass training=self.training and running statistics to it, or use a layer",
                    command="F.batch_norm(x, self.mean, self.var, training=self.training)",
                )
            )
    return found


def _while_validating(evidence: Evidence) -> list[Finding]:
    if not evidence.has("validation"):
        return []
    validation = evidence.part("validation", Validation)
    layers = [n for n in validation.training if _moves(evidence.layers[n])]
    found = []
    if layers:
        message = f"{name_layers(layers, of=len(evidence.layers))} ran in training mode while validate ran"
        found.append(_finding(layers, message, numbers={"modules": list(validation.random)}))
    elif validation.random:
        message = f"{_modules(validation.random)} dropped values at random while validate ran"
        found.append(_finding([], message, severity="warn", numbers={"modules": list(validation.random)}))
    return found


def _moves(layer: LayerEvidence) -> bool:
    """Whether the mode makes a difference to the layer."""
    return layer.tracks and layer.running_mean is not None and not layer.frozen


def _normalises_by_batch(layer: LayerEvidence) -> bool:
    return layer.training and layer.calls > 0 and _moves(layer)


def _modules(names: tuple[str, ...]) -> str:
    more = f", and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{plural(len(names), 'module')} ({', '.join(names[:8])}{more})"


def _by(difference: float) -> str:
    return f"by up to {difference:.2g} standard deviations"


def _finding(layers: list[str], message: str, **more: Any) -> Finding:
    given = {"cause": _FOUND_CAUSE, "remedy": "call model.eval() before evaluation", "command": "model.eval()"} | more
    return CHECK.finding(layers=tuple(layers), message=message, **given)
