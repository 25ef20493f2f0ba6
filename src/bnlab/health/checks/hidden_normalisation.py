"""Normalisation that the module tree does not show: layers built inside forward or kept in a plain list, or functions.

## What it measures

One forward of a few images in evaluation mode, in which each normalising operation of torch is seen, whichever code
calls it. Those of registered layers are known. Of the others it is noted which module's forward calls them, and where
their running statistics are: in registered buffers, in tensors that are not registered, made anew by each forward, or
nowhere.

## Why it is bad

What is not registered is not in the state_dict, does not move with .to(), is not trained, and .eval() does not reach
it: it may still normalise by the batch in evaluation, so that predictions depend on which images are together. No tool
that walks the modules finds it: recalibration, folding, freezing and synchronisation leave it out.

## Reported when

A warning, if running statistics are in tensors that are not registered, or are made anew by each forward, or if a
function normalises by its batch in evaluation. Information only, if a function normalises by registered statistics: it
works, but bnlab's own tools do not reach it.

## Known limits

A branch that the forward did not take is not seen. Not reported: a standardised convolution, which batch-normalises its
weights; normalisation of each image by itself (instance normalisation) without running statistics; and arithmetic that
normalises without an operation for it. Of a single image, normalisation by the batch and by the image are the same.

## Remedy

Register the layer: assign it to an attribute in __init__, or use nn.ModuleList in place of a list.

## References

torch.nn.Module (registration of sub-modules and buffers).
"""

from collections.abc import Sequence

from bnlab.errors import plural
from bnlab.health.check import Check, Finding
from bnlab.health.evidence import Evidence
from bnlab.health.gather.operations import Hidden
from bnlab.health.gather.trace import Trace

CHECK = Check(
    id="BN022",
    name="hidden-normalisation",
    severity="warn",
    stage="preview",
    safety="display only",
    needs=("hidden",),
)
_WHERE = {
    "outside": "keeps its statistics in tensors that are not registered",
    "rebuilt": "has its statistics made anew by each forward",
    "none": "keeps no statistics",
    "registered": "keeps its statistics in registered buffers",
}


def check(evidence: Evidence) -> list[Finding]:
    calls = evidence.part("hidden", Trace).hidden
    bad = [one for one in calls if one.statistics in ("outside", "rebuilt") or (one.by_batch and one.kind == "batch")]
    fine = [one for one in calls if one not in bad and one.statistics == "registered"]
    findings = []
    if bad:
        findings.append(
            CHECK.finding(
                layers=_owners(bad),
                message=_message(bad, calls),
                numbers=_numbers(bad, calls),
                cause="a layer is built inside forward or kept in a plain list or attribute of another type, or a "
                "function is called with statistics that are not registered",
                remedy="register the layer: assign it in __init__, in nn.ModuleList if there are several",
                command="self.norms = torch.nn.ModuleList(norms)",
            )
        )
    if fine:
        findings.append(
            CHECK.finding(
                severity="info",
                layers=_owners(fine),
                message=_message(fine, calls),
                numbers=_numbers(fine, calls),
                cause="a function normalises by the buffers of another module",
                remedy="use a layer in its place, which recalibration and the other checks reach",
            )
        )
    return findings


def _owners(found: Sequence[Hidden]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one.owner for one in found))


def _message(found: Sequence[Hidden], calls: dict[Hidden, int]) -> str:
    parts = []
    for one in found:
        what = one.layer or f"{one.kind} normalisation by a function"
        by = ", and normalises by its batch in evaluation" if one.by_batch and one.kind == "batch" else ""
        where = f"in the forward of {one.owner or 'the model itself'}"
        parts.append(f"{what} {where} {_WHERE[one.statistics]}{by} ({plural(calls[one], 'call')})")
    return "; ".join(parts)


def _numbers(found: Sequence[Hidden], calls: dict[Hidden, int]) -> dict[str, int]:
    return {"calls": sum(calls[one] for one in found), "by_batch": sum(calls[one] for one in found if one.by_batch)}
