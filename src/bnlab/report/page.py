"""Self-contained HTML pages: no network, no script, light and dark."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
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
MOST_CLASSES = 30  # a wider confusion matrix is no longer read as a table
THUMBNAIL = 160  # pixels


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A small picture that lies within the page, and what stands below it."""

    image: str
    """data: address"""
    lines: tuple[str, ...]
    path: str


def run_page(
    title: str,
    evaluation: Evaluation,
    rows: Rows,
    frozen: str,
    recipe: str,
    environment: Mapping[str, Any],
) -> str:
    """The page of one training: its figures, what was frozen, curves, mistakes, recipe and environment."""
    return _render(
        "run.html",
        title=title,
        evaluation=evaluation,
        rows=rows,
        best=max(
            (row for row in rows if row["val_top1"] is not None),
            key=lambda row: (row["val_top1"] or 0.0, -(row["val_loss"] or 0.0)),
        ),
        curves=figures.curves({"run": rows}),
        frozen=frozen,
        recipe=recipe,
        environment=environment,
    )


def evaluation_page(title: str, evaluation: Evaluation, classifier: str) -> str:
    """The page of one evaluation."""
    return _render("evaluation.html", title=title, evaluation=evaluation, classifier=classifier)


def demo_page(
    twins: Mapping[str, Rows],
    outcomes: Mapping[str, str],
    evaluation: Evaluation,
    asked: Iterable[tuple[str, str, float]],
    recipe: str,
    environment: Mapping[str, Any],
) -> str:
    """The page of the demo: two trainings from one recipe, and what the better one knows.

    `asked` are photos the classifier was asked about: path, the class it said, and how sure it was (0..1).
    """
    answers = [_thumbnail(path, (f"“{label}”", f"{probability:.1%}")) for path, label, probability in asked]
    return _render(
        "demo.html",
        title="bnlab demo",
        evaluation=evaluation,
        curves=figures.curves({name: rows for name, rows in twins.items() if rows}),
        outcomes=outcomes,
        answers=answers,
        recipe=recipe,
        environment=environment,
    )


def write_run_page(run: Run, evaluation: Evaluation, rows: Rows, frozen: str) -> None:
    """Write the run's report.html; `evaluation` is of its best classifier on val, `rows` are its metrics.

    `frozen` says what of the network was not trained.

    Raises:
        StorageError: no space left; an older report is untouched.
    """
    environment = read_json(run.environment)
    page = run_page(printable(run.folder), evaluation, rows, frozen, run.recipe.read_text("utf-8"), environment)
    write_atomic(run.report, page)


def mistakes_png(evaluation: Evaluation) -> bytes:
    """The surest mistakes as a contact sheet."""
    images, titles = [], []
    for i in evaluation.mistakes()[:SHOWN_MISTAKES]:
        try:
            photo = open_photo(evaluation.paths[i])
            photo.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))  # a camera's photo is a hundred times what is drawn
            images.append(photo)
        except PhotoError:
            continue  # it was there a moment ago; the sheet does without
        said, true = evaluation.predicted[i], evaluation.targets[i]
        titles.append(
            f"{printable(evaluation.classes[said])} {evaluation.probabilities[i, said]:.0%}\n"
            f"is {printable(evaluation.classes[true])}"
        )
    number = len(evaluation.mistakes())
    return figures.photos_png(images, titles, f"{len(images)} surest of {number} mistakes in {evaluation.n} photos")


def _render(template: str, *, evaluation: Evaluation, **values: Any) -> str:
    low, high = evaluation.top1_interval
    return render(
        template,
        evaluation=evaluation,
        interval=(low, high),
        matrix=_shaded(evaluation),
        reliability=figures.reliability(evaluation),
        mistakes=_mistakes(evaluation),
        number_of_mistakes=len(evaluation.mistakes()),
        **values,
    )


def _shaded(evaluation: Evaluation) -> Sequence[tuple[str, Sequence[tuple[int, float]]]]:
    """The confusion matrix row by row: the class, each count and its share of the row; nothing where it is too wide."""
    if len(evaluation.classes) > MOST_CLASSES:
        return []
    return [
        (label, [(int(n), float(n / max(row.sum(), 1))) for n in row])
        for label, row in zip(evaluation.classes, evaluation.confusion, strict=True)
    ]


def _mistakes(evaluation: Evaluation) -> list[Thumbnail]:
    thumbnails = []
    for i in evaluation.mistakes()[:SHOWN_MISTAKES]:
        said, true = evaluation.predicted[i], evaluation.targets[i]
        lines = (
            f"“{evaluation.classes[said]}” {evaluation.probabilities[i, said]:.0%}",
            f"is {evaluation.classes[true]}",
        )
        thumbnails.append(_thumbnail(evaluation.paths[i], lines))
    return thumbnails


def _thumbnail(path: str, lines: tuple[str, ...]) -> Thumbnail:
    image = ""
    try:
        photo = open_photo(path)
        photo.thumbnail((THUMBNAIL, THUMBNAIL))
        kind = "jpeg" if max(photo.size) == THUMBNAIL else "png"  # tiny pictures are worth their every pixel
        content = io.BytesIO()
        photo.save(content, kind, quality=85)
        image = f"data:image/{kind};base64," + base64.b64encode(content.getvalue()).decode("ascii")
    except PhotoError:
        pass  # the page shows its name alone
    return Thumbnail(image=image, lines=tuple(printable(line) for line in lines), path=printable(path))
