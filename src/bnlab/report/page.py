"""Self-contained HTML pages: no network, no script, light and dark."""

import base64
import io
import re
from collections.abc import Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from bnlab.classifier.evaluate import Evaluation
from bnlab.data.photo_file import PhotoReader
from bnlab.errors import PhotoError, plural, printable
from bnlab.files import read_json, write_atomic
from bnlab.report import figures
from bnlab.report.figures import Rows
from bnlab.runs import Run

SHOWN_MISTAKES = 24
THUMBNAIL = 160  # pixels
_FOLDER_OF_INIT = re.compile(r"""^(init: ['"]?)[^#\n]*[/\\]""", re.MULTILINE)  # private, and pages are passed on


def render(template: str, **values: Any) -> str:
    """The page that a template gives; a missing value is an error, and all values are escaped."""
    environment = Environment(
        loader=PackageLoader("bnlab.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "percent": _percent,
        "plural": plural,
        "format_number": format_number,
        "printable": printable,
        "thumbnail": _thumbnail,
        "public_path": public_path,
        "mistakes": _mistakes,
        "reliability": figures.reliability,
    }
    return environment.get_template(template).render(**values)


def public_path(path: str | PathLike[str]) -> str:
    """A path as pages show it: within the working folder the way from there, and otherwise the name of the file.

    Pages are passed on, and other folders are private.
    """
    within = Path(path).absolute()
    return str(within.relative_to(Path.cwd()) if within.is_relative_to(Path.cwd()) else within.name)


def write_run_page(run: Run, evaluation: Evaluation, rows: Rows, frozen: str, seen: Sequence[str] = ()) -> None:
    """Write the run's report.html: metrics, curves, mistakes, recipe and environment.

    `evaluation` is of its best classifier on val, `rows` are its metrics by epoch.
    `frozen` names the part of the network that was not trained, and `seen` says what earlier trainings saw of val.

    Raises:
        StorageError: no space left; an older report is untouched.
    """
    validated = [row for row in rows if row["val_top1"] is not None]
    page = render(
        "run.html",
        title=printable(run.name),
        evaluation=evaluation,
        rows=rows,
        best=max(validated, key=lambda row: (row["val_top1"] or 0.0, -(row["val_loss"] or 0.0))),
        curves=figures.curves({"run": rows}),
        frozen=frozen,
        seen=seen,
        recipe=_FOLDER_OF_INIT.sub(r"\1", run.recipe.read_text("utf-8")),
        environment=read_json(run.environment),
    )
    write_atomic(run.report, page)


def mistakes_png(evaluation: Evaluation) -> bytes:
    """The most confident mistakes as a contact sheet; photos that can no longer be read are left out."""
    images, titles = [], []
    for path, lines in _mistakes(evaluation):
        with suppress(PhotoError):
            photo = evaluation.reader.open(path)
            photo.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))  # a camera's photo is a hundred times what is drawn
            images.append(photo)
            titles.append("\n".join(map(printable, lines)))
    number = len(evaluation.mistakes())
    most = "" if len(images) == number else f"the {len(images)} most confident of "
    heading = f"{most}{plural(number, 'mistake')} in {plural(evaluation.n, 'photo')}"
    return figures.photos_png(images, titles, heading)


def _mistakes(evaluation: Evaluation) -> list[tuple[str, tuple[str, str]]]:
    """Path and caption of the mistakes that are shown: the predicted class with its probability, and the true one."""
    shown, classes = [], evaluation.classes
    for i in evaluation.mistakes()[:SHOWN_MISTAKES]:
        predicted, true = evaluation.predicted[i], evaluation.targets[i]
        probability = evaluation.probabilities[i, predicted]
        shown.append((evaluation.paths[i], (f"{classes[predicted]} {probability:.0%}", f"is {classes[true]}")))
    return shown


def _thumbnail(path: str, reader: PhotoReader) -> str:
    """A small picture of the photo as a data: URL; empty if the photo can no longer be read."""
    try:
        photo = reader.open(path)
    except PhotoError:
        return ""
    photo.thumbnail((THUMBNAIL, THUMBNAIL))
    kind = "jpeg" if max(photo.size) == THUMBNAIL else "png"  # tiny pictures lose by compression
    content = io.BytesIO()
    photo.save(content, kind, quality=85)
    return f"data:image/{kind};base64," + base64.b64encode(content.getvalue()).decode("ascii")


def format_number(value: float | None) -> str:
    """A number to three digits, with an exponent only where it is very large or small; None and NaN are a dash."""
    if value is None or value != value:  # noqa: PLR0124 (NaN)
        return "–"
    if value in (float("inf"), float("-inf")):
        return "∞" if value > 0 else "−∞"
    if value and not 1e-3 <= abs(value) < 1e6:
        text = f"{value:.2e}"
    else:
        text = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "−")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
