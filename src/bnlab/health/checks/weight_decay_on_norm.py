"""The optimiser decays gamma and beta, or does not have them at all.

## What it measures

The parameter groups of the optimiser: the weight decay of each gamma and beta that is trained, and the parameters of
the model that are trained but in no group.

## Why it is bad

Weight decay of the weights before a normalisation layer does not change what the network computes; that of gamma and
beta does. It pulls both to 0: gamma scales the layer's outputs, so channels can vanish, and beta moves the threshold
of the activation. It may help nevertheless, so this is advice. A parameter that requires a gradient and is in no
group costs the computation of its gradient and never changes.

## Reported when

A gamma or beta that is trained is in a group with weight decay: advice. A gamma or beta that requires a gradient is
in no group: advice. The optimiser has none of the model's parameters: a warning.

## Known limits

Only the key weight_decay of the groups is read: decay within the loss is not seen. Schedules that change it are not
known. Whether the decay hurts is not measured.

## Remedy

Put gamma and beta into a group of their own with weight_decay=0, or keep it knowingly. Pass all parameters that shall
be trained to the optimiser, and set requires_grad to False for the others.

## References

Summers & Dinneen 2020, "Four Things Everyone Should Know to Improve Batch Normalization", section 3.3, where decay of
gamma and beta helps; He et al. 2019, "Bag of Tricks for Image Classification", section 3.1, which leaves it out; van
Laarhoven 2017, "L2 Regularization versus Batch and Weight Normalization".
"""

from bnlab.errors import plural
from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import Evidence
from bnlab.health.gather.optimizer import OptimizerEvidence

CHECK = Check(
    id="BN014",
    name="weight-decay-on-norm",
    severity="info",
    stage="preview",
    safety="display only",
    needs=("optimizer",),
)


def check(evidence: Evidence) -> list[Finding]:
    part = evidence.part("optimizer", OptimizerEvidence)
    if not part.shared and part.foreign and part.missing:
        return [_other_model(part)]
    return _decayed(evidence, part) + _missing(evidence, part)


def _decayed(evidence: Evidence, part: OptimizerEvidence) -> list[Finding]:
    decay = {name: {k: d for k, d in keys.items() if d > 0} for name, keys in part.decay.items()}
    names = tuple(name for name in evidence.layers if decay.get(name))
    if not names:
        return []
    values = [d for keys in decay.values() for d in keys.values()]
    which = [key for key, word in (("gamma", "weight"), ("beta", "bias")) if any(word in decay[n] for n in names)]
    amount = f"{min(values):g}" if min(values) == max(values) else f"{min(values):g} to {max(values):g}"
    return [
        CHECK.finding(
            layers=names,
            message=(
                f"{part.kind} decays {' and '.join(which)} by {amount} in {name_layers(names, of=len(evidence.layers))}"
            ),
            numbers={"weight_decay": {name: decay[name] for name in names}},
            cause="all parameters are in one group",
            remedy="put gamma and beta into a group with weight_decay=0, or keep the decay knowingly",
            command=(
                f"optimizer = torch.optim.{part.kind}([{{'params': [p for p in model.parameters() if p.ndim > 1]}}, "
                "{'params': [p for p in model.parameters() if p.ndim <= 1], 'weight_decay': 0.0}], ...)"
            ),
        )
    ]


def _missing(evidence: Evidence, part: OptimizerEvidence) -> list[Finding]:
    missing = set(part.missing)
    own = {name: [key for key in ("weight", "bias") if _join(name, key) in missing] for name in evidence.layers}
    names = tuple(name for name, keys in own.items() if keys)
    if not names:
        return []
    return [
        CHECK.finding(
            layers=names,
            message=(
                f"gamma or beta requires a gradient but is not in the optimiser in "
                f"{name_layers(names, of=len(evidence.layers))}; so are {plural(len(missing), 'parameter')} in all"
            ),
            numbers={"missing": list(part.missing)},
            cause="they were left out of the optimiser's groups, or replaced after it was made",
            remedy="add them to the optimiser, or set requires_grad to False",
            command="optimizer.add_param_group({'params': [...], 'weight_decay': 0.0})",
        )
    ]


def _other_model(part: OptimizerEvidence) -> Finding:
    return CHECK.finding(
        severity="warn",
        message=(
            f"{part.kind} has {plural(part.foreign, 'parameter')}, but none of the {len(part.missing)} of the model "
            "that require a gradient"
        ),
        numbers={"foreign": part.foreign, "missing": list(part.missing)},
        cause="the optimiser was made for another model, or before the model's parameters were replaced",
        remedy="make the optimiser from the parameters of this model",
        command="optimizer = type(optimizer)(model.parameters(), **optimizer.defaults)",
    )


def _join(layer: str, key: str) -> str:
    return f"{layer}.{key}" if layer else key
