"""Self-contained HTML pages: no network, no script, light and dark."""

import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from bnlab.classifier.evaluate import Evaluation
from bnlab.data.preprocess import open_photo
from bnlab.errors import PhotoError, printable
from bnlab.files import read_json, write_atomic
from bnlab.report import figures
from bnlab.report.figures import Rows
from bnlab.report.html import render
from bnlab.runs import Run

SHOWN_MISTAKES = 24
MOST_CLASSES = 30  # a wider confusion matrix is not readable as a table
THUMBNAIL = 160  # pixels


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A small picture embedded in the page, and its caption."""

    image: str
    """a data: URL; empty if the photo can no longer be read"""
    lines: tuple[str, ...]
    path: str


def evaluation_page(title: str, evaluation: Evaluation, classifier: str) -> str:
    return _render("evaluation.html", title=title, evaluation=evaluation, classifier=classifier)


def demo_page(
    networks: Mapping[str, Rows],
    outcomes: Mapping[str, str],
    evaluation: Evaluation,
    predictions: Iterable[tuple[str, str, float]],
    recipe: str,
    environment: Mapping[str, Any],
) -> str:
    """The page of the demo: two trainings from one recipe, and the evaluation of the better one.

    `predictions` are its answers for a few photos: path, most probable class, probability (0..1).
    """
    answers = [_thumbnail(path, (label, f"{probability:.1%}")) for path, label, probability in predictions]
    return _render(
        "demo.html",
        title="bnlab demo",
        evaluation=evaluation,
        curves=figures.curves({name: rows for name, rows in networks.items() if rows}),
        outcomes=outcomes,
        answers=answers,
        recipe=recipe,
        environment=environment,
    )


def write_run_page(run: Run, evaluation: Evaluation, rows: Rows, frozen: str) -> None:
    """Write the run's report.html: metrics, curves, mistakes, recipe and environment.

    `evaluation` is of its best classifier on val, `rows` are its metrics by epoch.
    `frozen` names the part of the network that was not trained.

    Raises:
        StorageError: no space left; an older report is untouched.
    """
    validated = [row for row in rows if row["val_top1"] is not None]
    page = _render(
        "run.html",
        title=printable(run.folder),
        evaluation=evaluation,
        rows=rows,
        best=max(validated, key=lambda row: (row["val_top1"] or 0.0, -(row["val_loss"] or 0.0))),
        curves=figures.curves({"run": rows}),
        frozen=frozen,
        recipe=run.recipe.read_text("utf-8"),
        environment=read_json(run.environment),
    )
    write_atomic(run.report, page)


def mistakes_png(evaluation: Evaluation) -> bytes:
    """The most confident mistakes as a contact sheet; photos that can no longer be read are left out."""
    images, titles = [], []
    for path, lines in _mistakes(evaluation):
        with suppress(PhotoError):
            photo = open_photo(path)
            photo.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))  # a camera's photo is a hundred times what is drawn
            images.append(photo)
            titles.append("\n".join(map(printable, lines)))
    number = len(evaluation.mistakes())
    heading = f"the {len(images)} most confident of {number} mistakes in {evaluation.n} photos"
    return figures.photos_png(images, titles, heading)


def _render(template: str, *, evaluation: Evaluation, **values: Any) -> str:
    return render(
        template,
        evaluation=evaluation,
        matrix=_shaded(evaluation),
        reliability=figures.reliability(evaluation),
        mistakes=[_thumbnail(path, lines) for path, lines in _mistakes(evaluation)],
        **values,
    )


def _shaded(evaluation: Evaluation) -> Sequence[tuple[str, Sequence[tuple[int, float]]]]:
    """The confusion matrix by row: the class, each count and its fraction of the row; empty if it is too wide."""
    if len(evaluation.classes) > MOST_CLASSES:
        return []
    return [
        (label, [(int(n), float(n / max(row.sum(), 1))) for n in row])
        for label, row in zip(evaluation.classes, evaluation.confusion, strict=True)
    ]


def _mistakes(evaluation: Evaluation) -> Iterator[tuple[str, tuple[str, str]]]:
    """Path and caption of the mistakes that are shown: the predicted class with its probability, and the true one."""
    for i in evaluation.mistakes()[:SHOWN_MISTAKES]:
        predicted, true = evaluation.predicted[i], evaluation.targets[i]
        probability = evaluation.probabilities[i, predicted]
        yield (
            evaluation.paths[i],
            (
                f"{evaluation.classes[predicted]} {probability:.0%}",
                f"is {evaluation.classes[true]}",
            ),
        )


def _thumbnail(path: str, lines: tuple[str, ...]) -> Thumbnail:
    image = ""
    with suppress(PhotoError):
        photo = open_photo(path)
        photo.thumbnail((THUMBNAIL, THUMBNAIL))
        kind = "jpeg" if max(photo.size) == THUMBNAIL else "png"  # tiny pictures lose by compression
        content = io.BytesIO()
        photo.save(content, kind, quality=85)
        image = f"data:image/{kind};base64," + base64.b64encode(content.getvalue()).decode("ascii")
    return Thumbnail(image=image, lines=tuple(printable(line) for line in lines), path=printable(path))
