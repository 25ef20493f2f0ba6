"""`bnlab evaluate`: measure a classifier, or an ensemble, on photos whose classes are known."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bnlab.classifier.ensemble import Ensemble, open_classifiers
from bnlab.classifier.evaluate import Evaluation, evaluate
from bnlab.classifier.predict import Classifier
from bnlab.classifier.seen import SeenCount, union
from bnlab.data.dataset import open_evaluation_data
from bnlab.data.photo_file import PhotoReader
from bnlab.data.scan import Refusal, Result, report_refused
from bnlab.errors import printable
from bnlab.files import write_atomic, write_csv, write_json
from bnlab.machine import versions
from bnlab.options import EvaluateOptions
from bnlab.progress import LoggedProgress, Progress
from bnlab.report import figures
from bnlab.report.page import mistakes_png, public_path, render
from bnlab.runs import check_free, new_run


@dataclass(frozen=True, kw_only=True)
class EvaluateResult(Result):
    evaluation: Evaluation
    options: EvaluateOptions
    folder: Path | None = None
    """where the files are, if they were written"""
    seen: SeenCount
    """how many of the photos the classifier, or a member of the ensemble, has seen, in earlier trainings as well"""

    def __repr__(self) -> str:
        return self._line(*self.evaluation.facts(), *([str(self.folder)] if self.folder else []))

    def to_json(self) -> dict[str, Any]:
        """The content of evaluation.json."""
        alone = {} if self.evaluation.members else {"classifier": str(self.options.classifiers[0])}
        return self.evaluation.to_json() | {
            "seen_in_training": self.seen.known("train"),
            "seen_in_validation": self.seen.known("val"),
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
    unreadable: list[Refusal] = []
    split, photos = open_evaluation_data(options.data, options.split, unreadable, progress)
    ensemble = ensemble or open_classifiers(options.classifiers, options.device)
    members = ensemble.members
    files = [member.path or Path(name) for member, name in zip(members, ensemble.names, strict=True)]
    options = options.model_copy(update={"classifiers": files})  # the file of a run, where its folder was given
    reader = PhotoReader(max_megapixels=options.max_megapixels)
    evaluation = evaluate(
        members[0] if len(members) == 1 else ensemble,
        photos,
        split,
        batch_size=options.batch_size,
        workers=options.workers,
        progress=progress,
        crops=options.crops,
        reader=reader,
    )
    evaluation = replace(evaluation, refused=(*unreadable, *evaluation.refused))
    report_refused(evaluation.refused, strict=options.strict, progress=progress)
    evaluation.reader.report(progress)
    seen = union([member.card.seen for member in members]).count_files(evaluation.paths)
    sentences = _sentences(seen, members)
    for sentence in sentences:
        if seen.train:
            progress.warn(f"{sentence}: evaluate on others")
        else:
            progress.note(sentence)
    result = EvaluateResult(
        evaluation=evaluation,
        options=options,
        seen=seen,
        warnings=tuple(progress.warnings),
        refused=evaluation.refused,
    )
    return _with_files(result, members) if write else result


def _sentences(seen: SeenCount, members: Sequence[Classifier]) -> list[str]:
    return seen.sentences("it was" if len(members) == 1 else "its members were")


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
    names = ", ".join(printable(public_path(path)) for path in options.classifiers)
    trained = ", ".join(
        dict.fromkeys(f"{member.card.network}, {member.card.preprocessing.size} px" for member in members)
    )
    title = f"{names} on {evaluation.split} of {printable(public_path(options.data))}"
    seen = _sentences(result.seen, members)
    page = render("evaluation.html", title=title, evaluation=evaluation, classifier=trained, seen=seen)
    write_atomic(folder / "report.html", page)
    return result


def _rows(evaluation: Evaluation) -> Iterator[tuple[object, ...]]:
    classes = evaluation.classes
    for path, target, predicted, row in zip(
        evaluation.paths, evaluation.targets, evaluation.predicted, evaluation.probabilities, strict=True
    ):
        yield path, classes[target], classes[predicted], f"{row[predicted]:.6f}", *(f"{p:.6f}" for p in row)
