"""Repairs a copy of a model, and compares the scores before and after each repair on the same images."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn

from bnlab.errors import BnlabError, UsageError, plural
from bnlab.health import repairs as every
from bnlab.health.batches import Batches, Metric
from bnlab.health.check import Finding, name_layers
from bnlab.health.compare import Comparison
from bnlab.health.evidence import Floats
from bnlab.health.gather.layers import find_layers
from bnlab.health.gather.operations import tensors_of
from bnlab.health.gather.statistics_switch import StatisticsSwitch
from bnlab.health.repairs import Repair
from bnlab.health.restore import restored
from bnlab.machine import is_out_of_memory
from bnlab.norm.model_utils import copy_module, unwrap_model
from bnlab.norm.recalibrate import evaluation_mode

_EXACT = 1e-3  # standard deviations of an output, for rounding

ASKED: Mapping[str, Callable[[], Repair]] = {
    "BN013": every.drop_bias,
    **dict.fromkeys(
        ("BN007", "BN008", "BN015", "BN027", "BN028", "BN101", "BN102", "BN107", "BN108", "BN113", "BN114"),
        every.recalibrate,
    ),
}
"""the repair that a finding of a check asks for, where its remedy is safe"""


@dataclass(frozen=True, kw_only=True)
class Applied:
    """One repair that was tried."""

    name: str
    safety: str
    layers: tuple[str, ...]
    """those that it changed"""
    skipped: Mapping[str, str]
    """the layers that it left as they are, each with the reason"""
    comparison: Comparison | None
    """the scores before and after it; None: without labels and metric there are no scores"""
    kept: bool = True
    """whether the repaired model has it"""
    reason: str = ""
    """why it was not kept"""

    def __str__(self) -> str:
        number = name_layers(self.layers) if self.layers else "no layer"
        lines = [f"{self.name} ({self.safety}) changed {number}"]
        if self.comparison is not None:
            lines.append(changed(self.comparison))
        if self.skipped:
            reasons = dict.fromkeys(self.skipped.values())
            lines.append(f"{plural(len(self.skipped), 'layer')} skipped: {'; '.join(reasons)}")
        if not self.kept:
            lines.append(f"it was not kept, since {self.reason}")
        return ". ".join(line[0].upper() + line[1:] if i else line for i, line in enumerate(lines)) + "."

    def to_json(self) -> dict[str, Any]:
        return {
            "repair": self.name,
            "safety": self.safety,
            "layers": list(self.layers),
            "skipped": dict(self.skipped),
            "comparison": self.comparison and self.comparison.to_json(),
            "kept": self.kept,
            "reason": self.reason or None,
        }


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """A repaired copy of a model, and what was done."""

    model: nn.Module = field(repr=False)
    """the copy, in the mode of the caller's model, and without what wrapped that"""
    applied: tuple[Applied, ...]
    """all repairs that were tried, in their order; `kept` says which the model has"""
    comparison: Comparison | None
    """the scores of the caller's model and of the repaired one"""
    images: int
    """how many images were scored"""
    same_images: bool
    """whether statistics were measured on the images that were scored"""
    chosen: bool = False
    """whether the repairs were chosen by these scores, so that the gain of those kept is rather too large"""

    @property
    def kept(self) -> tuple[Applied, ...]:
        return tuple(one for one in self.applied if one.kept)

    def __str__(self) -> str:
        lines = [str(one) for one in self.applied] or ["Nothing was to be repaired."]
        if len(self.kept) > 1 and self.comparison is not None:
            lines.append(f"All together: {changed(self.comparison)}.")
        if self.same_images and any(one.name in ("recalibrate", "adapt") and one.kept for one in self.applied):
            lines.append("The statistics were measured on the images that were scored.")
        if self.chosen and self.kept:
            lines.append("These images chose what was kept: measure the accuracy to report on others.")
        return "\n".join(line[0].upper() + line[1:] for line in lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "same_images": self.same_images,
            "chosen_on_these_images": self.chosen,
            "comparison": self.comparison and self.comparison.to_json(),
            "repairs": [one.to_json() for one in self.applied],
        }


def repair(
    model: nn.Module,
    batches: Iterable[Any],
    repairs: Iterable[Repair] | Iterable[Finding],
    *,
    labels: Callable[[Any], Any] | None = None,
    metric: Metric | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    images: int | None = None,
    calibration: Iterable[Any] | None = None,
) -> Repaired:
    """Repair a copy of a model, and measure what each repair changes on the same images. The model is not changed.

    Repairs are made in the order given, each on the model that the one before gave. Of the findings of a diagnosis,
    the repairs are tried that they ask for and that cannot change what was trained; those are kept that help (a
    significant gain of at least 1 point) or that change no output.

    >>> from bnlab import health
    >>> report = health.diagnose(model, val_loader)
    >>> repaired = health.repair(model, val_loader, report.findings, calibration=train_loader)
    >>> repaired = health.repair(model, val_loader, [health.repairs.recalibrate(layer_by_layer=True)])
    >>> print(repaired)

    Args:
        model: any nn.Module, possibly within a DistributedDataParallel or compiled.
        batches: what the model is scored on, as `diagnose` takes them.
        repairs: of `health.repairs`; or the findings of a report.
        labels, metric, forward: as in `diagnose`.
        images: stop after the batch that reaches this number of images, in `calibration` as well (None: all).
        calibration: what statistics are measured on: training images without augmentation, so that those that are
            scored remain new to the model (default: `batches`).

    Raises:
        TypeError: the model is not an nn.Module, or `repairs` holds something else.
        UsageError: the model cannot be copied or repaired, or batches, labels and options do not fit.
        DataError: there is no image.
    """
    given = [repairs] if isinstance(repairs, Repair | Finding) else list(repairs)
    findings = [one for one in given if isinstance(one, Finding)]
    chosen = [one for one in given if isinstance(one, Repair)]
    if len(findings) + len(chosen) < len(given) or (findings and chosen):
        raise TypeError("repairs has to be a list of health.repairs, or of the findings of a report")
    if findings:
        chosen = asked_for(findings)
    if images is not None and images < 1:
        raise UsageError(f"images={images}", "pass the number of images to run, at least 1, or None for all")
    network = _copy(model)
    device = next((t.device for t in chain(network.parameters(), network.buffers())), torch.device("cpu"))
    scored = Batches(batches, device, images, labels, forward, metric)
    measured = scored if calibration is None else Batches(calibration, device, images, labels, forward, metric)
    with restored(generators=[*scored.generators, *([] if measured is scored else measured.generators)]):
        network, applied, comparison = _apply(network, chosen, scored, measured, choose=bool(findings))
        number = sum(map(len, scored))
    return Repaired(
        model=network,
        applied=tuple(applied),
        comparison=comparison,
        images=number,
        same_images=calibration is None,
        chosen=bool(findings),
    )


def _apply(
    network: nn.Module, repairs: Sequence[Repair], scored: Batches, measured: Batches, *, choose: bool
) -> tuple[nn.Module, list[Applied], Comparison | None]:
    """The repaired network, what was tried, and the scores of both; with `choose`, only what helps is kept."""
    first = now = score(network, scored)
    applied: list[Applied] = []
    for one in repairs:
        tried, changes = _tried(network, one, measured)
        after = score(tried, scored) if changes.layers else now
        comparison = None if now is None or after is None else scored.compare(now, after)
        reason = ""
        if one.exact and changes.layers and not _same_outputs(network, tried, scored):
            reason = "it changes the outputs, so something else reads what it changed"
        elif choose:
            reason = _why_not(one, changes, comparison)
        applied.append(
            Applied(
                name=one.name,
                safety=one.safety,
                layers=changes.layers,
                skipped=changes.skipped,
                comparison=comparison,
                kept=not reason,
                reason=reason,
            )
        )
        if not reason:
            network, now = tried, after
    return network, applied, None if first is None or now is None else scored.compare(first, now)


@torch.no_grad()
def _same_outputs(first: nn.Module, second: nn.Module, batches: Batches) -> bool:
    """Whether all outputs are equal but for rounding."""
    with ExitStack() as stack:
        for network in (first, second):
            stack.enter_context(restored(network))
            stack.enter_context(evaluation_mode(network))
            StatisticsSwitch(find_layers(network)).to("running")
        for batch in batches:
            one, other = (tensors_of(batches.call(network, batch)) for network in (first, second))
            for x, y in zip(one, other, strict=True):
                scale = float(x.double().std()) if x.numel() > 1 else 1.0
                if not torch.allclose(x.double(), y.double(), rtol=0, atol=_EXACT * max(scale, 1e-6), equal_nan=True):
                    return False
    return True


def asked_for(findings: Sequence[Finding]) -> list[Repair]:
    """The safe repairs that findings ask for, each once; exact ones first."""
    makers = {ASKED[f.id]: None for f in findings if f.safety == "safe" and f.id in ASKED}
    return sorted((make() for make in makers), key=lambda repair: not repair.exact)


@torch.no_grad()
def score(network: nn.Module, batches: Batches) -> Floats | None:
    """The scores of all images in evaluation mode; None without labels and metric."""
    parts = []
    with restored(network), evaluation_mode(network):
        StatisticsSwitch(find_layers(network)).to("running")  # also where they are marked as outdated
        for batch in batches:
            try:
                output = batches.call(network, batch)
            except Exception as error:  # of any type: it is the caller's own code
                if isinstance(error, BnlabError) or is_out_of_memory(error):
                    raise
                raise UsageError(
                    f"the model cannot be run on a batch ({_line(error)})",
                    "pass batches as the model takes them, or forward=, which calls it",
                ) from error
            part = batches.score(output, batch)
            if part is None:
                return None
            parts.append(part)
    return torch.cat(parts).numpy()


def changed(comparison: Comparison) -> str:
    """For example "accuracy was 81.2% and is 93.4% on 1,024 images (+12.2 points, 95% interval ..., p = 3e-31)"."""
    what = "accuracy" if comparison.is_accuracy else "the metric"
    before, after = comparison.text(comparison.before), comparison.text(comparison.after)
    return f"{what} was {before} and is {after} {comparison.evidence('+')}"


def _why_not(one: Repair, changes: every.Changes, comparison: Comparison | None) -> str:
    """Why a repair that findings ask for is not kept; empty if it is."""
    if not changes.layers:
        return "it changed nothing"
    if one.exact:
        return "accuracy is lower with it" if comparison is not None and comparison.reversed().matters else ""
    if comparison is None:
        return "without labels or a metric it is not known whether it helps"
    if comparison.matters:
        return ""
    if comparison.gain <= 0:
        return "it does not help"
    return "its gain is too small to matter, or may be chance: more images would decide"


def _copy(model: nn.Module) -> nn.Module:
    try:
        copied = copy_module(unwrap_model(model))
    except ValueError as error:
        problem, _, remedy = str(error).partition(": ")
        raise UsageError(problem, remedy) from None
    except (RuntimeError, NotImplementedError) as error:
        raise UsageError(
            f"the model cannot be copied ({_line(error)})", "pass a model that copy.deepcopy takes"
        ) from None
    assert isinstance(copied, nn.Module)
    return copied


@torch.no_grad()
def _tried(network: nn.Module, one: Repair, batches: Batches) -> tuple[nn.Module, every.Changes]:
    """A repaired copy of the network."""
    copied = copy_module(network)
    try:
        return copied, one.apply(copied, batches)
    except Exception as error:  # of any type: the caller's batches and code are run
        if isinstance(error, BnlabError) or is_out_of_memory(error):
            raise
        raise UsageError(
            f"{one.name}: {_line(error)}", "nothing was repaired; pass batches that the model can use"
        ) from error


def _line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
