"""`bnlab doctor`: find, explain and repair faults of batch normalisation in a classifier or any PyTorch network."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from bnlab.classifier.file import Card
from bnlab.classifier.predict import Classifier
from bnlab.data.class_names import read_classes
from bnlab.data.dataset import open_evaluation_data
from bnlab.data.photo_batches import PhotoBatches
from bnlab.data.photo_file import PhotoReader
from bnlab.data.photos import Photos
from bnlab.data.preprocess import Preprocessing
from bnlab.data.scan import Refusal, Result, report_refused
from bnlab.errors import ClassifierError, DataError, UsageError, plural, printable
from bnlab.files import write_atomic, write_json
from bnlab.health import diagnose
from bnlab.health.check import Finding, finding_key
from bnlab.health.report import Report
from bnlab.machine import choose_device, memory_errors, versions
from bnlab.nets.factory import build_model
from bnlab.nets.load_weights import load_weights
from bnlab.options import DoctorOptions
from bnlab.progress import LoggedProgress, Progress
from bnlab.report.health_page import diagnosis_page
from bnlab.runs import check_free, new_run

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


@dataclass(frozen=True, kw_only=True)
class Patient:
    """The network to diagnose, and how photos become its input."""

    name: str
    network: nn.Module
    classes: tuple[str, ...] | None
    """in the order of its outputs; None: those of the folders"""
    preprocessing: Preprocessing
    card: Card | None = None
    checkpoint: Path | None = None
    """file of the weights"""


@dataclass(frozen=True, kw_only=True)
class DoctorResult(Result):
    report: Report
    options: DoctorOptions
    model: str
    split: str
    folder: Path | None = None
    """where diagnosis.json and report.html are, if they were written"""

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
            "versions": versions(),
        }


def run(options: DoctorOptions, progress: Progress, *, write: bool = True) -> DoctorResult:
    """Diagnose, and `write` diagnosis.json and report.html to a new run folder."""
    progress = LoggedProgress(progress)
    check_free(options.runs, options.name)
    known = _read_baseline(options.baseline) if options.baseline else frozenset[str]()
    patient = open_model(options)
    split, batches, reference = _open_photos(options, patient, progress)
    device = choose_device(options.device)
    patient.network.to(device).eval()
    with memory_errors(options.batch_size, patient.preprocessing.size):
        report = diagnose(
            patient.network,
            batches,
            images=None,
            checkpoint=patient.checkpoint,
            reference=reference,
            mean=patient.preprocessing.mean,
            std=patient.preprocessing.std,
            select=options.select or (),
            ignore=options.ignore or (),
            progress=progress,
        )
    report_refused(batches.refused, strict=options.strict, progress=progress)
    report = replace(
        report,
        findings=tuple(finding for finding in report.findings if finding.key() not in known),
        known=tuple(finding for finding in report.findings if finding.key() in known),
    )
    result = DoctorResult(
        report=report,
        options=options,
        model=patient.name,
        split=split,
        warnings=tuple(progress.warnings),
        refused=tuple(batches.refused),
    )
    return _with_files(result, patient) if write else result


def open_model(options: DoctorOptions) -> Patient:
    """The classifier, or the network that the caller's code makes, with its weights.

    Raises:
        UsageError: MODEL names no network, or an option has no effect on it.
        ClassifierError: the file or the weights cannot be read, or do not fit.
    """
    path = Path(options.model)
    if ":" in options.model and not path.exists():
        return _from_code(options)
    given = [name for name in ("weights", "size", "resize", "mean", "std", "classes") if getattr(options, name)]
    if given:
        raise UsageError(f"{given[0]} has no effect on a classifier file, which knows it", f"leave {given[0]} out")
    if path.suffix == ".py":
        raise UsageError(
            f"'{printable(path)}' does not say which network to build",
            f"name the function that makes it: {printable(path)}:NAME",
        )
    if path.is_file() and path.suffix != ".safetensors":
        raise UsageError(
            f"{printable(path)} is not a classifier file",
            "name the code that makes the network, PATH.py:NAME, and pass this file as weights",
        )
    classifier = Classifier.load(path, "cpu")
    return Patient(
        name=printable(classifier.path or path),
        network=classifier.network,
        classes=classifier.classes,
        preprocessing=classifier.card.preprocessing,
        card=classifier.card,
        checkpoint=classifier.path,
    )


def _from_code(options: DoctorOptions) -> Patient:
    network = build_model(options.model)
    if options.weights is not None:
        load_weights(network, options.weights)
    preprocessing = Preprocessing(
        size=options.size or 224,
        resize=options.resize or "crop",
        crop_fraction=0.875 if options.resize != "squash" else 1.0,
        mean=_colour(options.mean, MEAN, "mean"),
        std=_colour(options.std, STD, "std"),
    )
    return Patient(
        name=printable(options.model),
        network=network,
        classes=read_classes(options.classes) if options.classes else None,
        preprocessing=preprocessing,
        checkpoint=options.weights,
    )


def _colour(text: str | None, default: tuple[float, float, float], name: str) -> tuple[float, float, float]:
    if text is None:
        return default
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) == 1:
        values *= 3
    if len(values) != 3 or (name == "std" and min(values) <= 0):
        raise UsageError(f"{name} '{printable(text)}' is not three numbers", f"pass R,G,B in 0..1, such as {default}")
    return values


def _open_photos(
    options: DoctorOptions, patient: Patient, progress: Progress
) -> tuple[str, PhotoBatches, PhotoBatches | None]:
    refused: list[Refusal] = []
    split, photos = open_evaluation_data(options.data, options.split, refused, progress)
    classes = patient.classes or tuple(sorted(set(photos.labels)))
    _check_classes(options.data, photos, classes, patient)
    reader = PhotoReader(max_megapixels=options.max_megapixels)

    def batches(some: Photos) -> PhotoBatches:
        return PhotoBatches(
            photos=some,
            classes=classes,
            preprocessing=patient.preprocessing,
            batch_size=options.batch_size,
            images=options.images,
            workers=options.workers,
            reader=reader,
        )

    if len(photos) < 2:
        raise DataError(f"{printable(options.data)} has one photo in {split}", "diagnose on two photos or more")
    own = batches(photos)
    own.refused = refused
    reference = None
    if options.reference is not None:
        _, others = open_evaluation_data(options.reference, None, [], progress)
        _check_classes(options.reference, others, classes, patient)
        reference = batches(others)
    elif split in ("val", "test"):
        try:
            _, others = open_evaluation_data(options.data, "train", [], None)
            reference = batches(others)
        except DataError:  # it has no train split
            reference = None
    return split, own, reference


def _check_classes(data: Path, photos: Photos, classes: Sequence[str], patient: Patient) -> None:
    unknown = sorted(set(photos.labels) - set(classes))
    if unknown:
        names = ", ".join(printable(name) for name in unknown[:5])
        raise ClassifierError(
            f"{printable(data)} has {plural(len(unknown), 'class').replace('classs', 'classes')} that the model does "
            f"not know ({names})",
            f"it knows {', '.join(printable(name) for name in classes[:20])}; rename or remove the others",
        )
    outputs = _outputs(patient.network)
    if patient.card is None and outputs is not None and outputs != len(classes):
        raise ClassifierError(
            f"the network has {outputs} outputs, but {printable(data)} has {len(classes)} classes",
            "pass its class names in the order of its outputs as classes, or the network for these classes",
        )


def _outputs(network: nn.Module) -> int | None:
    """The number of outputs, if the last layer with weights is linear or a 1 x 1 convolution."""
    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if not layers:
        return None
    last = layers[-1]
    return (
        last.out_features if isinstance(last, nn.Linear) else last.out_channels if last.kernel_size == (1, 1) else None
    )


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


def _with_files(result: DoctorResult, patient: Patient) -> DoctorResult:
    options = result.options
    folder = new_run(options.runs, options.name, stem="doctor").folder
    result = replace(result, folder=folder)
    write_json(folder / "diagnosis.json", result.to_json())
    write_atomic(folder / "report.html", diagnosis_page(result.report, result.model, str(options.data), result.split))
    return result
