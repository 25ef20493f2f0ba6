"""`bnlab evaluate`: how good a classifier is on photos whose classes are known."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnlab.classifier.card import Card
from bnlab.classifier.evaluate import Evaluation, evaluate
from bnlab.classifier.predict import Classifier
from bnlab.data.listing import read_list
from bnlab.data.photos import Photo, Photos
from bnlab.data.scan import tell_refused
from bnlab.data.source import open_evaluation_data
from bnlab.errors import printable
from bnlab.files import file_sha256, write_atomic, write_csv, write_json
from bnlab.machine import versions
from bnlab.progress import Progress
from bnlab.report import figures
from bnlab.report.page import evaluation_page, mistakes_png
from bnlab.runs import RUNS, Run, check_free, new_run


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """What `bnlab evaluate` is told."""

    classifier: Path
    """a classifier file"""
    data: Path
    """a split folder, a split.csv or a folder of classes"""
    split: str | None = None
    """train, val, test or all; unless given, the first there is of test, val and all"""
    name: str | None = None
    """of the folder in runs; evaluate, evaluate2, ... unless given"""
    batch_size: int = 32
    workers: int = -1
    device: str = "auto"
    strict: bool = False
    """refuse to go on when a photo cannot be used"""
    root: Path = RUNS


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """The evaluation, and the folder with its files."""

    evaluation: Evaluation
    folder: Path
    classifier: Path
    data: Path
    seen: int | None
    """how many of the photos it was trained on; None where that is not known"""

    def to_json(self) -> dict[str, Any]:
        """The document of `bnlab evaluate --json`, and evaluation.json."""
        return self.evaluation.to_json() | {
            "seen_in_training": self.seen,
            "classifier": str(self.classifier),
            "data": str(self.data),
            "folder": str(self.folder),
            "versions": versions(),
        }


def run(settings: EvaluateSettings, progress: Progress) -> EvaluateResult:
    """Evaluate, and write evaluation.json, predictions.csv, report.html and the pictures.

    Raises:
        BnlabError: the classifier or the data cannot be used; the disk is full.
    """
    check_free(settings.root, settings.name)
    split, photos = open_evaluation_data(settings.data, settings.split)
    classifier = Classifier.load(settings.classifier, settings.device)
    evaluation = evaluate(
        classifier, photos, split, batch_size=settings.batch_size, workers=settings.workers, progress=progress
    )
    tell_refused(evaluation.refused, strict=settings.strict, progress=progress)
    seen = _seen_in_training(settings.classifier, classifier.card, evaluation)
    if seen:
        progress.warn(f"{seen} of {evaluation.n} photos are among those it was trained on: the figures flatter it")
    folder = new_run(settings.root, settings.name, stem="evaluate").folder
    result = EvaluateResult(
        evaluation=evaluation, folder=folder, classifier=settings.classifier, data=settings.data, seen=seen
    )
    write_json(folder / "evaluation.json", result.to_json())
    write_csv(
        folder / "predictions.csv",
        ("path", "class", "predicted", "probability", *(f"p({name})" for name in evaluation.classes)),
        _rows(evaluation),
    )
    write_atomic(folder / "confusion.png", figures.confusion_png(evaluation))
    write_atomic(folder / "reliability.png", figures.reliability_png(evaluation))
    if evaluation.mistakes():
        write_atomic(folder / "mistakes.png", mistakes_png(evaluation))
    title = f"{printable(settings.classifier)} on {split} of {printable(settings.data)}"
    trained = f"{classifier.card.network}, {classifier.card.view.size} px"
    write_atomic(folder / "report.html", evaluation_page(title, evaluation, trained))
    return result


def _seen_in_training(file: Path, card: Card, evaluation: Evaluation) -> int | None:
    """How many photos the classifier was trained on, by content; None where its run's list does not lie beside it."""
    listed = Run(file.parent).split
    try:
        if file_sha256(listed) != card.split_sha256:
            return None
        trained_on = read_list(listed).side("train")
        judged_on = Photos.of(Photo(path, "", "", file_sha256(path)) for path in evaluation.paths)
        return judged_on.number_among(trained_on)
    except OSError:
        return None


def _rows(evaluation: Evaluation) -> Iterator[tuple[object, ...]]:
    classes = evaluation.classes
    for path, target, predicted, row in zip(
        evaluation.paths, evaluation.targets, evaluation.predicted, evaluation.probabilities, strict=True
    ):
        yield path, classes[target], classes[predicted], f"{row[predicted]:.6f}", *(f"{p:.6f}" for p in row)
