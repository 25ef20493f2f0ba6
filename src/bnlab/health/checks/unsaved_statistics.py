"""The saved weights lack the running statistics, so that a network that is loaded from them normalises by others.

## What it measures

The state_dict of the network, and the checkpoint that the caller passes, are loaded into a copy whose running
statistics are NaN before: those that are NaN afterwards were not saved. Names are compared with and without a prefix
that wrappers and trainers add ("module.", "_orig_mod.", "model."). Then the missing ones are set to the initial mean 0
and variance 1, as in a fresh process, and the images are classified by the copy and by the network.

## Why it is bad

A network works until it is saved and loaded. The parameters come back, the statistics do not: buffers that are not
persistent, a file of the parameters alone (as fine-tuning libraries write), or names with a prefix that
load_state_dict(strict=False) drops without a word.

## Reported when

The statistics of any layer do not come back: an error, since it is exact. A warning, if they come back only because a
prefix is removed, which strict=False does not do; or if they come back with other values than the network's, while all
parameters that are saved have the network's values.

## Known limits

The cost is measured with fresh statistics in the layers that miss theirs; a base model from which other statistics
would come is not known. Parameters that miss are counted, but not reset. A checkpoint whose parameters are not those of
the network is of another step, and is not compared. A missing num_batches_tracked alone is not reported.

## Remedy

Save the whole `state_dict()`, with buffers that are persistent; load it with strict=True, and without the prefix. Where
the statistics are lost, recalibrate on training images.

## References

PEFT#1732 and #3481 (statistics never saved); torch.nn.Module.register_buffer (persistent).
"""

import numpy as np

from bnlab.errors import plural
from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.compare import Comparison
from bnlab.health.evidence import Evidence
from bnlab.health.gather.checkpoint import SavedEvidence

CHECK = Check(
    id="BN021",
    name="unsaved-statistics",
    severity="error",
    stage="preview",
    safety="display only",
    needs=("state_dict",),
    reads=("checkpoint",),
)


def check(evidence: Evidence) -> list[Finding]:
    own = evidence.part("state_dict", SavedEvidence)
    findings = []
    if evidence.has("checkpoint"):
        findings = _findings(evidence, evidence.part("checkpoint", SavedEvidence), "the checkpoint")
    return findings or _findings(evidence, own, "state_dict()")


def _findings(evidence: Evidence, saved: SavedEvidence, what: str) -> list[Finding]:
    of = len(evidence.layers)
    numbers = {
        "tensors": saved.tensors,
        "missing_parameters": saved.missing_parameters,
        "difference": saved.difference,
    }
    cost = _cost(evidence, saved)
    off = "" if not saved.difference else f"; outputs differ by up to {saved.difference:.2g} standard deviations"
    if saved.missing:
        if saved.not_persistent:
            cause = "the buffers are registered with persistent=False"
        elif not saved.has_statistics:
            cause = "the parameters alone were saved"
        else:
            cause = "the buffers were left out when it was saved, or have other names"
        lacks = f", nor {plural(saved.missing_parameters, 'parameter')}" if saved.missing_parameters else ""
        return [
            CHECK.finding(
                layers=saved.missing,
                message=f"{what} does not bring back the running statistics of {name_layers(saved.missing, of)}{lacks}"
                f"{off}",
                numbers=numbers,
                cost=cost,
                cause=cause,
                remedy="save the whole state_dict(), with persistent buffers; recalibrate where they are lost",
                command="torch.save(model.state_dict(), FILE)",
            )
        ]
    if saved.renamed:
        return [
            CHECK.finding(
                severity="warn",
                layers=saved.renamed,
                message=f"the names in {what} begin with '{saved.prefix}', so that load_state_dict(strict=False) "
                f"silently drops the running statistics of {name_layers(saved.renamed, of)}{off}",
                numbers={**numbers, "prefix": saved.prefix},
                cost=cost,
                cause="the state_dict of a wrapper was saved, such as DistributedDataParallel or a compiled model",
                remedy="save the state_dict of the network within the wrapper, and load with strict=True",
                command="torch.save(wrapper.module.state_dict(), FILE)",
            )
        ]
    if saved.differing and not saved.other_weights:
        return [
            CHECK.finding(
                severity="warn",
                layers=saved.differing,
                message=f"{what} has other running statistics than the network in {name_layers(saved.differing, of)}, "
                f"while the parameters are the same{off}",
                numbers=numbers,
                cost=cost,
                cause="it was saved before the statistics changed, as by a recalibration or a forward in training mode",
                remedy="save the network again",
                command="torch.save(model.state_dict(), FILE)",
            )
        ]
    return []


def _cost(evidence: Evidence, saved: SavedEvidence) -> Comparison | None:
    scores = evidence.scores
    if scores is None or scores.running is None or saved.scores is None or len(saved.scores) != len(scores.running):
        return None
    same = np.array_equal(saved.scores, scores.running)  # the model was loaded from it, and has lost them too
    sound = scores.population if same and scores.population is not None else scores.running
    return Comparison.measure(saved.scores, sound, scores.kind)
