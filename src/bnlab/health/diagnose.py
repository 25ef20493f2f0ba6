"""Diagnoses the batch normalisation of any PyTorch model: gathers the evidence, and lets the checks read it."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnlab.errors import UsageError
from bnlab.health.batches import Batches, Metric
from bnlab.health.check import Finding
from bnlab.health.compare import LOST
from bnlab.health.evidence import Evidence, Scores
from bnlab.health.gather.attribution import attribute
from bnlab.health.gather.backends import check_backends
from bnlab.health.gather.checkpoint import read_checkpoint
from bnlab.health.gather.gather import gather
from bnlab.health.gather.layers import find_layers
from bnlab.health.registry import chosen, run_checks
from bnlab.health.report import Report
from bnlab.health.restore import restored
from bnlab.health.subject import Given, Subject, TrainStep, Validate
from bnlab.norm.model_utils import unwrap
from bnlab.progress import NullProgress, Progress

IMAGES = 1024


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
    ranks: Sequence[Mapping[str, Any]] | None = None,
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
        ranks: the state_dicts of all processes of a distributed training, to compare their statistics. Where
            torch.distributed runs and all processes diagnose, they need not be passed.
        mean, std: the constants by which the caller normalised the images, for each colour, to compare with others.
        backends: ways to run the model that are compared with the plain one: channels_last, bfloat16, float16,
            compile, trace, script and onnx.
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
    _check_constants(mean, std)
    entries = chosen(select, ignore)
    check_backends(backends)
    saved = None if checkpoint is None else read_checkpoint(checkpoint)
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
        checkpoint=saved,
        train_step=train_step,
        validate=validate,
        sources=sources,
        padding=padding,
        ranks=ranks,
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
        parts={part for entry in entries for part in (*entry.check.needs, *entry.check.reads)},
        notes=notes,
        progress=progress or NullProgress(),
    )
    generators = [own_generator for b in (own, *others.values()) if b is not None for own_generator in b.generators]
    with restored(model, generators=generators), _without_compiling():
        evidence = gather(subject)
        findings, skipped = run_checks(evidence, entries)
        attribution = attribute(subject, evidence, findings)
    notes += _what_was_not_shown(evidence, findings)
    scores = evidence.scores
    means = Scores().means() if scores is None else scores.means()
    return Report(
        findings=findings,
        accuracy={"running": means["running"], "batch": means["batch"], "recalibrated": means["population"]},
        is_accuracy=metric is None,
        images=evidence.images,
        skipped=skipped,
        notes=tuple(notes),
        attribution=attribution,
        evidence=evidence,
    )


def _what_was_not_shown(evidence: Evidence, findings: Sequence[Finding]) -> list[str]:
    """What few images cannot decide, lest "no findings" be read as "sound"."""
    notes, scores = [], evidence.scores
    gap = None if scores is None else scores.compare("running", "population")
    if (
        not findings
        and gap is not None
        and gap.is_accuracy
        and gap.gain > 0
        and not gap.matters
        and gap.interval[1] >= 5 * LOST
    ):
        notes.append(
            f"recalibrated statistics give {gap.text(gap.after)} instead of {gap.text(gap.before)} "
            f"{gap.evidence()}, which may be chance: more images would decide"
        )
    if evidence.layers and evidence.batches == 1:
        notes.append(
            "there is a single batch: how far statistics differ between batches is not known, so that the checks that "
            "compare them with the running statistics find little; pass two batches or more"
        )
    return notes


def _check_constants(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    for name, given in (("mean", mean), ("std", std)):
        if given is None:
            continue
        values = torch.as_tensor(given, dtype=torch.float64).flatten()
        if len(values) not in (1, 3) or not values.isfinite().all() or (name == "std" and not (values > 0).all()):
            kind = "positive numbers" if name == "std" else "numbers"
            raise UsageError(f"{name}={given}", f"pass three {kind}, for red, green and blue, or a single one")


def _without_compiling() -> AbstractContextManager[Any]:
    """Let compiled parts of the model run as they were written, for the hooks within them would be compiled too."""
    loaded = "torch._dynamo" in sys.modules  # else nothing is compiled, and importing it takes seconds
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


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
