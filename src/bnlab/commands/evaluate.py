"""`bnlab evaluate`: measure a classifier, or an ensemble, on photos whose classes are known."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from bnlab.classifier.ensemble import Ensemble, open_classifiers
from bnlab.classifier.evaluate import Evaluation, evaluate
from bnlab.classifier.file import Card
from bnlab.classifier.predict import Classifier
from bnlab.data.dataset import open_evaluation_data
from bnlab.data.photos import Photo, Photos
from bnlab.data.scan import Result, report_refused
from bnlab.data.split_csv import read_split_csv
from bnlab.errors import printable
from bnlab.files import file_sha256, write_atomic, write_csv, write_json
from bnlab.machine import versions
from bnlab.options import EvaluateOptions
from bnlab.progress import LoggedProgress, Progress
from bnlab.report import figures
from bnlab.report.page import mistakes_png, render
from bnlab.runs import Run, check_free, new_run


@dataclass(frozen=True, kw_only=True)
class EvaluateResult(Result):
    evaluation: Evaluation
    options: EvaluateOptions
    folder: Path | None = None
    """where the files are, if they were written"""
    seen: int | None
    """number of the photos that the classifier, or a member of the ensemble, was trained on; None if unknown"""

    def to_json(self) -> dict[str, Any]:
        """The content of evaluation.json."""
        alone = {} if self.evaluation.members else {"classifier": str(self.options.classifiers[0])}
        return self.evaluation.to_json() | {
            "seen_in_training": self.seen,
            **alone,
            "data": str(self.options.data),
            "folder": self.folder and str(self.folder),
            "versions": versions(),
        }


def run(
    options: EvaluateOptions, progress: Progress, *, ensemble: Ensemble | None = None, write: bool = True
) -> EvaluateResult:
    """Evaluate, and `write` evaluation.json, predictions.csv, report.html and the figures to a new run folder.

    `ensemble` is what `options.classifiers` names, if it is loaded already.
    """
    progress = LoggedProgress(progress)
    check_free(options.runs, options.name)
    split, photos = open_evaluation_data(options.data, options.split)
    ensemble = ensemble or open_classifiers(options.classifiers, options.device)
    members = ensemble.members
    files = [member.path or Path(name) for member, name in zip(members, ensemble.names, strict=True)]
    options = options.model_copy(update={"classifiers": files})  # the file of a run, where its folder was given
    evaluation = evaluate(
        members[0] if len(members) == 1 else ensemble,
        photos,
        split,
        batch_size=options.batch_size,
        workers=options.workers,
        progress=progress,
        crops=options.crops,
    )
    report_refused(evaluation.refused, strict=options.strict, progress=progress)
    seen = _seen_in_training(options.classifiers, [member.card for member in members], evaluation)
    if seen:
        what = "it was" if len(members) == 1 else "its members were"
        progress.warn(f"{seen} of {evaluation.n} photos are among those {what} trained on: evaluate on others")
    result = EvaluateResult(
        evaluation=evaluation,
        options=options,
        seen=seen,
        warnings=tuple(progress.warnings),
        refused=evaluation.refused,
    )
    return _with_files(result, members) if write else result


def _with_files(result: EvaluateResult, members: Sequence[Classifier]) -> EvaluateResult:
    """Write the files to a new run folder."""
    options, evaluation = result.options, result.evaluation
    folder = new_run(options.runs, options.name, stem="evaluate").folder
    result = replace(result, folder=folder)
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
    names = ", ".join(printable(path) for path in options.classifiers)
    trained = ", ".join(
        dict.fromkeys(f"{member.card.network}, {member.card.preprocessing.size} px" for member in members)
    )
    title = f"{names} on {evaluation.split} of {printable(options.data)}"
    page = render("evaluation.html", title=title, evaluation=evaluation, classifier=trained)
    write_atomic(folder / "report.html", page)
    return result


def _seen_in_training(files: Sequence[Path], cards: Sequence[Card], evaluation: Evaluation) -> int | None:
    """Number of the evaluated photos, compared by content, that a classifier was trained on.

    It is unknown (None) if the split.csv of the classifier's run is not next to it; with several classifiers, if that
    is so for one of them and no other was trained on any of the photos.
    """
    lists: dict[str, Photos | None] = {}
    for file, card in zip(files, cards, strict=True):
        lists[card.split_sha256] = lists.get(card.split_sha256) or _trained_on(file, card)
    known = [photos for photos in lists.values() if photos is not None]
    if not known:
        return None
    try:
        evaluated = Photos.of(Photo(path, "", "", file_sha256(path)) for path in evaluation.paths)
    except OSError:
        return None
    seen = evaluated.count_shared(known[0] if len(known) == 1 else Photos.of(chain(*known)))
    return seen if seen or len(known) == len(lists) else None


def _trained_on(file: Path, card: Card) -> Photos | None:
    listed = Run(file.parent).split
    try:
        return read_split_csv(listed).in_split("train") if file_sha256(listed) == card.split_sha256 else None
    except OSError:
        return None


def _rows(evaluation: Evaluation) -> Iterator[tuple[object, ...]]:
    classes = evaluation.classes
    for path, target, predicted, row in zip(
        evaluation.paths, evaluation.targets, evaluation.predicted, evaluation.probabilities, strict=True
    ):
        yield path, classes[target], classes[predicted], f"{row[predicted]:.6f}", *(f"{p:.6f}" for p in row)
