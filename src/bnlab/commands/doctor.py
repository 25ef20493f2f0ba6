"""`bnlab doctor`: find, explain and repair faults of batch normalisation in a classifier or any PyTorch network."""

import json
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from bnlab.classifier.opened import (
    OF_CODE,
    OpenedModel,
    check_classes,
    check_output,
    is_code,
    measured_on,
    open_model,
    photo_batches,
    save_model,
)
from bnlab.data.dataset import open_evaluation_data
from bnlab.data.photo_batches import PhotoBatches
from bnlab.data.scan import Refusal, Result, report_refused
from bnlab.errors import DataError, UsageError, printable, quoted
from bnlab.files import write_atomic, write_json
from bnlab.health import Repaired, diagnose, repair
from bnlab.health.check import RECALIBRATE, Finding, finding_key
from bnlab.health.report import Report
from bnlab.machine import choose_device, memory_errors, versions
from bnlab.options import DoctorOptions
from bnlab.progress import LoggedProgress, Progress
from bnlab.report.health_page import diagnosis_page
from bnlab.runs import check_free, new_run


@dataclass(frozen=True, kw_only=True)
class DoctorResult(Result):
    report: Report
    options: DoctorOptions
    model: str
    split: str
    folder: Path | None = None
    """where diagnosis.json and report.html are, if they were written"""
    repaired: Repaired | None = None
    """what was repaired, if that was asked for; `options.fix` was written if any repair was kept"""

    def failing(self) -> tuple[Finding, ...]:
        """The findings that make the exit status 1."""
        return self.report.at_or_above(self.options.fail_on)

    def to_json(self) -> dict[str, Any]:
        """The content of diagnosis.json."""
        return {
            "model": self.model,
            **self.report.to_json(),
            "data": str(self.options.data),
            "split": self.split,
            "refused": [{"path": refusal.path, "reason": refusal.reason} for refusal in self.refused],
            "folder": self.folder and str(self.folder),
            "fix": self._fix(),
            "versions": versions(),
        }

    def _fix(self) -> dict[str, Any] | None:
        if self.repaired is None:
            return None
        return self.repaired.to_json() | {"output": str(self.options.fix) if self.repaired.kept else None}


def run(options: DoctorOptions, progress: Progress, *, write: bool = True) -> DoctorResult:
    """Diagnose, repair if `options.fix` asks for it, and `write` diagnosis.json and report.html to a new run folder."""
    progress = LoggedProgress(progress)
    if options.fix is not None:
        check_output(options.fix, options.model, "fix")
    check_free(options.runs, options.name)
    known = _read_baseline(options.baseline) if options.baseline else frozenset[str]()
    model = open_model(options)
    refused: list[Refusal] = []
    split, batches, reference = _open_photos(options, model, refused, progress)
    device = choose_device(options.device)
    model.network.to(device).eval()
    with memory_errors(options.batch_size, model.preprocessing.size):
        report = diagnose(
            model.network,
            batches,
            images=None,
            checkpoint=model.checkpoint,
            reference=reference,
            mean=model.preprocessing.mean,
            std=model.preprocessing.std,
            select=options.select or (),
            ignore=options.ignore or (),
            progress=progress,
        )
    if model.card is not None:
        seen = model.card.seen.count_files([photo.path for photo in batches.used])
        for sentence in seen.sentences("it was") if seen.train else ():
            progress.warn(f"{sentence}: its accuracy on others is what counts")
    refused += batches.refused + ([] if reference is None else reference.refused)
    report_refused(refused, strict=options.strict, progress=progress)
    repaired = None
    if options.fix is not None:
        repaired = _fix(options.fix, model, report, batches, reference, progress)
    findings = [_with_command(finding, options) for finding in report.findings]
    report = replace(
        report,
        findings=tuple(finding for finding in findings if finding.key() not in known),
        known=tuple(finding for finding in findings if finding.key() in known),
    )
    result = DoctorResult(
        report=report,
        options=options,
        model=model.name,
        split=split,
        repaired=repaired,
        warnings=tuple(progress.warnings),
        refused=tuple(refused),
    )
    return _with_files(result, model) if write else result


def _with_command(finding: Finding, options: DoctorOptions) -> Finding:
    """The finding with a command of the shell, where its own is a line of Python that a verb does as well."""
    if finding.command != RECALIBRATE:
        return finding
    given = {name: getattr(options, name) for name in OF_CODE}
    words = [f" --{name} {quoted(str(value))}" for name, value in given.items() if value is not None]
    data = quoted(options.data if options.reference is None else options.reference)
    suffix = ".pt" if is_code(options.model) else ".safetensors"
    names = chain(["recalibrated"], (f"recalibrated{number}" for number in count(2)))
    new = next(name for name in names if not Path(name + suffix).exists()) + suffix
    command = f"bnlab recalibrate {quoted(options.model)}{''.join(words)} --data {data} --output {new}"
    return replace(finding, command=command)


def _fix(
    path: Path,
    model: OpenedModel,
    report: Report,
    batches: PhotoBatches,
    reference: PhotoBatches | None,
    progress: Progress,
) -> Repaired:
    """Write the model with the safe repairs that help, if there are any."""
    calibration = batches if reference is None else reference
    with memory_errors(batches.batch_size, model.preprocessing.size):
        repaired = repair(model.network, batches, report.findings, calibration=reference)
    if not repaired.kept:
        progress.warn(f"{printable(path)} was not written, since no safe repair is shown to help")
        return repaired
    card = model.card
    if card is not None and any(one.name == "recalibrate" for one in repaired.kept):
        card = measured_on(card, calibration.used, {}, chosen_by=batches.used)
    save_model(path, model, repaired.model, card)
    return repaired


def _open_photos(
    options: DoctorOptions, model: OpenedModel, refused: list[Refusal], progress: Progress
) -> tuple[str, PhotoBatches, PhotoBatches | None]:
    """The split, its photos, and those of the training; folders that cannot be read are added to `refused`."""
    split, photos = open_evaluation_data(options.data, options.split, refused, progress)
    others, source = None, options.data
    if options.reference is not None:
        source = options.reference
        _, others = open_evaluation_data(source, None, refused, progress)
    elif split in ("val", "test"):
        try:
            _, others = open_evaluation_data(options.data, "train", [], None)
        except DataError:  # it has no train split
            others = None
    labels = set(photos.labels) | (set() if others is None else set(others.labels))
    classes = model.classes or tuple(sorted(labels))
    check_classes(options.data, photos, classes, model)
    if others is not None:
        check_classes(source, others, classes, model)
    if len(photos) < 2:
        raise DataError(f"{printable(options.data)} has one photo in {split}", "diagnose on two photos or more")

    reference = None if others is None else photo_batches(model, others, classes, options)
    return split, photo_batches(model, photos, classes, options), reference


def _read_baseline(path: Path) -> frozenset[str]:
    try:
        document = json.loads(path.read_text("utf-8"))
        found = [finding_key(one["id"], one["layers"]) for one in document["findings"]]
        return frozenset([*found, *document["known"]])
    except OSError:
        raise UsageError(
            f"there is no file {printable(path)}", "pass the diagnosis.json of an earlier diagnosis"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"{printable(path)} is not a diagnosis", "pass the diagnosis.json of an earlier diagnosis as baseline"
        ) from None


def _with_files(result: DoctorResult, model: OpenedModel) -> DoctorResult:
    options = result.options
    folder = new_run(options.runs, options.name, stem="doctor").folder
    result = replace(result, folder=folder)
    write_json(folder / "diagnosis.json", result.to_json())
    page = diagnosis_page(result.report, result.model, str(options.data), result.split, result.repaired)
    write_atomic(folder / "report.html", page)
    return result
