"""Gathers all evidence of a diagnosis: layers, one traced forward, the passes over all images, and other parts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnlab.errors import BnlabError, UsageError, plural
from bnlab.health.evidence import Evidence
from bnlab.health.gather import averaged as averaged_model
from bnlab.health.gather import backends as backends_
from bnlab.health.gather import checkpoint as checkpoint_
from bnlab.health.gather import folding, inputs, modes, outdated, processes, steps, training_images, uses
from bnlab.health.gather import optimizer as optimizer_part
from bnlab.health.gather import padding as padding_part
from bnlab.health.gather import sources as sources_part
from bnlab.health.gather.layers import describe, other_norms, with_trace
from bnlab.health.gather.passes import Passes, run_passes
from bnlab.health.gather.statistics_switch import StatisticsSwitch
from bnlab.health.gather.trace import Trace, trace
from bnlab.health.restore import restored
from bnlab.health.statistics import dead_by_parameters
from bnlab.health.subject import Subject
from bnlab.norm.recalibrate import evaluation_mode

TRACED = 4  # images that are run to see how the layers are used
GATHERERS: Mapping[Callable[[Subject, Evidence], Mapping[str, Any]], tuple[str, ...]] = {
    averaged_model.gather: ("averaged",),
    backends_.gather: ("backends",),
    checkpoint_.gather: ("state_dict", "checkpoint"),
    folding.gather: ("folding",),
    outdated.gather: ("outdated",),
    modes.gather: ("modes", "alone", "train_mode", "validation"),
    steps.gather: ("training", "train_step"),
    uses.gather: ("uses",),
    optimizer_part.gather: ("optimizer",),
    processes.gather: ("sync", "ranks"),
    sources_part.gather: ("sources",),
    padding_part.gather: ("padding",),
    inputs.gather: ("preprocessing", "colours", "resolution", "eps"),
    training_images.gather: ("reference", "augmented", "dropout"),
}
"""each measures these parts of the evidence beyond the passes over all images, if the caller gave what it takes"""


def gather(subject: Subject) -> Evidence:
    """Gather all evidence. The caller restores the model."""
    network, batches = subject.network, subject.batches
    first = batches.sample(1 << 30)
    subject.usual = len(first)
    layers = {name: describe(name, module) for name, module in subject.layers.items()}
    evidence = Evidence(
        layers=layers,
        batch_size=len(first),
        root_training=network.training,
        training_modules=tuple(
            f"{name or 'the model'} ({type(module).__name__})"
            for name, module in network.named_modules()
            if subject.modes[name] and not any(True for _ in module.children())
        ),
        other_norms=other_norms(network),
    )
    StatisticsSwitch(subject.layers).to("running")  # also where they are marked as outdated, so that it can be run
    seen = _trace(subject)
    try:
        return _gather_rest(subject, evidence, seen)
    finally:
        seen.restore()


def _gather_rest(subject: Subject, evidence: Evidence, seen: Trace) -> Evidence:
    layers = {name: with_trace(layer, seen, subject.network) for name, layer in evidence.layers.items()}
    order = sorted(layers.values(), key=lambda layer: (layer.depth is None, layer.depth or 0))
    evidence = replace(evidence, layers={layer.name: layer for layer in order}, parts={"hidden": seen})
    passes = _passes(subject, evidence)
    evidence = _with_passes(evidence, passes)
    parts = dict(evidence.parts)
    for gatherer, measured in GATHERERS.items():
        if not subject.parts.isdisjoint(measured):
            with restored(subject.network):
                parts |= gatherer(subject, replace(evidence, parts=parts))
    _note_layers(subject, evidence, seen)
    return replace(evidence, parts=parts, notes=tuple(subject.notes))


def _trace(subject: Subject) -> Trace:
    sample = subject.batches.sample(TRACED)
    try:
        with evaluation_mode(subject.network):
            if isinstance(subject.network, torch.jit.ScriptModule):
                return Trace()
            return trace(subject.network, subject.layers, lambda: subject.call(sample))
    except BnlabError:
        raise
    except Exception as error:  # of any type: it is the caller's own code
        text = (str(error).strip().splitlines() or [""])[0]
        raise UsageError(
            f"the model cannot be run on {plural(len(sample), 'image')} of the shape {list(sample.images.shape[1:])} "
            f"({type(error).__name__}: {text[:200]})",
            "pass batches as the model takes them, or forward=, which calls it",
        ) from error


def _passes(subject: Subject, evidence: Evidence) -> Passes:
    total = subject.batches.images
    try:
        total = total if total is not None else subject.usual * len(subject.batches.source)  # type: ignore[arg-type]
    except TypeError:  # it has no length
        total = 0
    with subject.progress.task("diagnosing", 3 * (total or 0), "images") as task:
        suspects = {name: dead_by_parameters(layer) for name, layer in evidence.layers.items()}
        return run_passes(subject.network, subject.layers, subject.batches, task, suspects)


def _with_passes(evidence: Evidence, passes: Passes) -> Evidence:
    layers = {
        name: replace(
            layer,
            evaluation=passes.evaluation.get(name),
            batch=passes.batch.get(name),
            positives=passes.positives.get(name),
            not_finite=name in passes.not_finite,
        )
        for name, layer in evidence.layers.items()
    }
    return replace(
        evidence,
        layers=layers,
        scores=passes.scores,
        images=passes.images,
        batches=len(passes.batch_sizes),
        last_batch_size=passes.batch_sizes[-1],
        single=passes.single,
        classes_in_batch=classes_in_batch(passes.labels, passes.batch_sizes),
    )


def classes_in_batch(labels: Tensor | None, sizes: Sequence[int]) -> tuple[float, float] | None:
    """How many classes a batch has on average, and how many it would have if the images were shuffled."""
    if labels is None or len(sizes) < 2:
        return None
    counts = np.unique(labels.numpy(), return_counts=True)[1]
    n, found, shuffled = len(labels), 0.0, 0.0
    for part in torch.split(labels, list(sizes)):
        found += len(np.unique(part.numpy()))
        # a class of c images is absent from a batch of b with probability C(n - c, b) / C(n, b)
        absent = [_absent(n, int(c), len(part)) for c in counts]
        shuffled += len(counts) - sum(absent)
    return found / len(sizes), shuffled / len(sizes)


def _absent(n: int, c: int, b: int) -> float:
    if c + b > n:
        return 0.0
    i = np.arange(c)
    return float(np.exp(np.log((n - b - i) / (n - i)).sum()))


def _note_layers(subject: Subject, evidence: Evidence, seen: Trace) -> None:
    """Say what kind of normalisation there is, if it is not what one expects."""
    if not evidence.layers and not isinstance(subject.network, torch.jit.ScriptModule):
        kinds = ", ".join(f"{number} {kind}" for kind, number in evidence.other_norms.items())
        rest = f"; its {kinds} keep no statistics" if kinds else ""
        subject.notes.append(
            f"the model has no layer that keeps statistics{rest}, so most checks have nothing to check"
        )
    guided = [layer.name for layer in evidence.layers.values() if layer.inputs > 1]
    if guided:
        subject.notes.append(
            f"called with more than one tensor, such as a mask: {', '.join(guided[:8])}"
            f"{', ...' if len(guided) > 8 else ''}; what is said of batch and recalibrated statistics is of all their "
            "positions, so it may not hold"
        )
    never = [name for name in evidence.layers if name not in seen.used]
    if never and seen.used:
        subject.notes.append(f"never reached by the forward: {', '.join(never[:8])}{', ...' if len(never) > 8 else ''}")
