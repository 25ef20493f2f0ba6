"""Diagnoses the batch normalisation of any PyTorch model: gathers the evidence, and lets the checks read it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnlab.errors import BnlabError, UsageError, plural
from bnlab.health.batches import Batches, Metric
from bnlab.health.evidence import Evidence, LayerEvidence, Scores
from bnlab.health.gather import inputs, training_images
from bnlab.health.gather.layers import Trace, describe, find_layers, other_norms, trace, with_trace
from bnlab.health.gather.passes import Passes, run_passes
from bnlab.health.registry import chosen, run_checks
from bnlab.health.report import Report
from bnlab.health.restore import restored
from bnlab.health.subject import Given, Subject, TrainStep, Validate
from bnlab.norm.model_utils import unwrap
from bnlab.norm.recalibrate import evaluation_mode
from bnlab.progress import NullProgress, Progress

IMAGES = 1024
TRACED = 4  # images that are run to see how the layers are used
GATHERERS: tuple[Callable[[Subject, Evidence], Mapping[str, Any]], ...] = (inputs.gather, training_images.gather)
"""each measures parts of the evidence beyond the passes over all images, if the caller gave what it takes"""


def diagnose(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    labels: Callable[[Any], Any] | None = None,
    metric: Metric | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    images: int | None = IMAGES,
    optimizer: torch.optim.Optimizer | None = None,
    averaged: nn.Module | None = None,
    checkpoint: str | Path | Mapping[str, Any] | None = None,
    train_step: TrainStep | None = None,
    validate: Validate | None = None,
    reference: Iterable[Any] | None = None,
    augmented: Iterable[Any] | None = None,
    sources: Callable[[Any], Any] | None = None,
    padding: Callable[[Any], Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    backends: Sequence[str] = ("channels_last", "bfloat16"),
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    progress: Progress | None = None,
) -> Report:
    """Find faults of batch normalisation in a model, their cost in accuracy, their causes and remedies.

    The weights stay fixed, and everything is restored at the end, also after an error or Ctrl-C: the state_dict, modes,
    momenta, hooks, the optimiser and the generators of random numbers. Nothing is written. Code of the caller's that is
    passed (`train_step`, `validate`, `forward`, `metric`) is run.

    >>> from bnlab import health
    >>> report = health.diagnose(model.eval(), val_loader)
    >>> print(report)

    Args:
        model: any nn.Module, in evaluation mode, as it is used; on any device, possibly wrapped in
            DistributedDataParallel or compiled.
        batches: what the model is used on: a DataLoader or a list of batches; the batch size is that of training, and
            the images are shuffled. A batch is a tensor, a tuple whose last element may be the labels, or a mapping
            whose labels have one of the usual names. What can be read only once is kept in memory.
        labels: takes a batch and returns the class of each image, where batches do not show it.
        metric: takes the output and the batch, and returns a score of each image (N), or of the batch; higher is
            better. Without it, the score is whether the class is correct.
        forward: takes the model and a batch, and returns the output (default: the model is called with the batch
            without its labels).
        images: stop after the batch that reaches this number of images (None: all).
        optimizer: the optimiser of the training.
        averaged: a model with averaged weights (EMA, SWA) of the same architecture.
        checkpoint: file or state_dict from which the model is loaded elsewhere.
        train_step: takes the model and a batch, and makes one step of the training. It is run on a few batches, and
            what it changes of the model and of `optimizer` is undone.
        validate: takes the model and validates it as the caller does.
        reference: batches of training images without augmentation, to tell stale statistics from images that are not
            like those of the training.
        augmented: batches of training images with their augmentation.
        sources: takes a batch and returns the source of each image (N), such as the camera, or real and generated.
        padding: takes a batch and returns which positions are padding: bool, N x L.
        mean, std: the constants by which the caller normalised the images, for each colour, to compare with others.
        backends: ways to run the model that are compared with the plain one: channels_last, bfloat16, float16,
            compile, trace and onnx.
        select: ids or names of the checks to make (default: all).
        ignore: ids or names of checks not to make.
        progress: receives the progress.

    Raises:
        TypeError: the model is not an nn.Module.
        UsageError: the batches, labels or options do not fit the model or each other, or the model cannot be run on
            them.
        DataError: there is no image.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the first argument must be the model, an nn.Module, not {type(model).__name__}")
    if images is not None and images < 1:
        raise UsageError(f"images={images}", "pass the number of images to run, at least 1, or None for all")
    entries = chosen(select, ignore)
    notes: list[str] = []
    network = _network(model, notes)
    device = next((t.device for t in chain(network.parameters(), network.buffers())), torch.device("cpu"))
    own = Batches(batches, device, images, labels, forward, metric)
    others = {
        name: None if given is None else Batches(given, device, images, labels, forward, metric)
        for name, given in (("reference", reference), ("augmented", augmented))
    }
    given = Given(
        optimizer=optimizer,
        averaged=averaged,
        checkpoint=checkpoint,
        train_step=train_step,
        validate=validate,
        sources=sources,
        padding=padding,
        mean=mean,
        std=std,
        backends=backends,
        **others,
    )
    subject = Subject(
        model=model,
        network=network,
        layers={} if isinstance(network, torch.jit.ScriptModule) else find_layers(network),
        batches=own,
        given=given,
        device=device,
        modes={name: module.training for name, module in network.named_modules()},
        notes=notes,
        progress=progress or NullProgress(),
    )
    generators = [own_generator for b in (own, *others.values()) if b is not None for own_generator in b.generators]
    with restored(model, generators=generators):
        evidence = gather(subject)
    findings, skipped = run_checks(evidence, entries)
    scores = evidence.scores
    means = Scores().means() if scores is None else scores.means()
    return Report(
        findings=findings,
        accuracy={"running": means["running"], "batch": means["batch"], "recalibrated": means["population"]},
        is_accuracy=metric is None,
        images=evidence.images,
        skipped=skipped,
        notes=tuple(notes),
        evidence=evidence,
    )


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
    seen = _trace(subject)
    layers = {name: with_trace(layer, seen, network) for name, layer in layers.items()}
    order = sorted(layers.values(), key=lambda layer: (layer.depth is None, layer.depth or 0))
    evidence = replace(evidence, layers={layer.name: layer for layer in order}, parts={"hidden": seen})
    passes = _passes(subject)
    evidence = _with_passes(evidence, passes)
    parts = dict(evidence.parts)
    for gatherer in GATHERERS:
        with restored(subject.network):
            parts |= gatherer(subject, replace(evidence, parts=parts))
    _note_layers(subject, evidence, seen)
    return replace(evidence, parts=parts, notes=tuple(subject.notes))


def _network(model: nn.Module, notes: list[str]) -> nn.Module:
    """The network that a model wraps."""
    if hasattr(model, "_orig_mod"):
        notes.append("the model is compiled: what it was compiled from was run")
    inner = model
    while True:
        wrapped = isinstance(inner, nn.parallel.DistributedDataParallel | nn.DataParallel)
        following = inner.module if wrapped else getattr(inner, "_orig_mod", None)
        if not isinstance(following, nn.Module):
            break
        inner = following
    if isinstance(inner, torch.jit.ScriptModule):
        notes.append(
            "a scripted or traced model does not show its layers: only its outputs by running statistics were checked. "
            "Pass the model that it was made of"
        )
        return inner
    try:
        return unwrap(inner)
    except ValueError as error:
        raise UsageError(str(error).partition(":")[0], str(error).partition(": ")[2]) from None


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


def _passes(subject: Subject) -> Passes:
    total = subject.batches.images
    try:
        total = total if total is not None else subject.usual * len(subject.batches.source)  # type: ignore[arg-type]
    except TypeError:  # it has no length
        total = 0
    with subject.progress.task("diagnosing", 3 * (total or 0), "images") as task:
        return run_passes(subject.network, subject.layers, subject.batches, task)


def _with_passes(evidence: Evidence, passes: Passes) -> Evidence:
    layers = {
        name: replace(layer, evaluation=passes.evaluation.get(name), batch=passes.batch.get(name))
        for name, layer in evidence.layers.items()
    }
    return replace(
        evidence,
        layers=layers,
        scores=passes.scores,
        images=passes.images,
        batches=len(passes.batch_sizes),
        last_batch_size=passes.batch_sizes[-1],
        classes_in_batch=classes_in_batch(passes.labels, passes.batch_sizes),
    )


def classes_in_batch(labels: Tensor | None, sizes: Sequence[int]) -> tuple[float, float] | None:
    """How many classes a batch has on average, and how many it would have if the images were shuffled."""
    if labels is None or len(sizes) < 2:
        return None
    counts = np.unique(labels.numpy(), return_counts=True)[1]
    n, found, shuffled = len(labels), 0.0, 0.0
    for part in torch.split(labels, list(sizes)):
        found += len(part.unique())
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
    never = [name for name in evidence.layers if name not in seen.used]
    if never and seen.used:
        subject.notes.append(f"never reached by the forward: {', '.join(never[:8])}{', ...' if len(never) > 8 else ''}")


__all__ = ["GATHERERS", "IMAGES", "LayerEvidence", "classes_in_batch", "diagnose", "gather"]
