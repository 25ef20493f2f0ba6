"""`bnlab predict`: which class is this photo?"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bnlab.classifier.predict import Classifier, Prediction
from bnlab.data.preprocess import open_photo
from bnlab.data.scan import Refusal, photos_below, report_refused
from bnlab.errors import DataError, PhotoError, UsageError, printable
from bnlab.files import storage_errors, write_atomic, write_csv
from bnlab.progress import Progress
from bnlab.report import figures
from bnlab.runs import RUNS, new_run

MOST_SHOWN = 60  # photos on one sheet


@dataclass(frozen=True, kw_only=True)
class PredictSettings:
    """What `bnlab predict` is told."""

    classifier: Path
    """a classifier file"""
    photos: tuple[Path, ...]
    """photos, and folders of photos"""
    top: int = 5
    """how many of the most probable classes to give"""
    csv: Path | None = None
    """file to write the answers to; it must not exist"""
    show: bool = False
    """make a picture of the photos with their answers"""
    batch_size: int = 32
    device: str = "auto"
    strict: bool = False
    """refuse to go on when a photo cannot be used"""
    root: Path = RUNS


@dataclass(frozen=True, kw_only=True)
class PredictResult:
    """The answers in the order given, and the picture of them, where one was wanted."""

    predictions: list[Prediction]
    picture: Path | None

    def to_json(self) -> list[dict[str, Any]]:
        """The document of `bnlab predict --json`."""
        return [asdict(prediction) for prediction in self.predictions]


def run(settings: PredictSettings, progress: Progress) -> PredictResult:
    """Ask the classifier about each photo.

    Raises:
        BnlabError: the classifier cannot be used, a path is not there, or not one photo can be used.
    """
    paths = list(_expanded(settings.photos))
    if settings.csv:
        with storage_errors(settings.csv):
            if settings.csv.exists():
                raise UsageError(f"{printable(settings.csv)} exists already", "give --csv a new file")
            settings.csv.parent.mkdir(parents=True, exist_ok=True)
    classifier = Classifier.load(settings.classifier, settings.device)
    predictions = classifier.predict(paths, top=settings.top, batch_size=settings.batch_size, progress=progress)
    refused = [Refusal(p.path, p.error) for p in predictions if p.error]
    report_refused(refused, strict=settings.strict, progress=progress)
    if len(refused) == len(predictions):
        raise PhotoError(refused[0].path, refused[0].reason)
    if settings.csv:
        _write_csv(settings.csv, predictions)
    return PredictResult(predictions=predictions, picture=_picture(settings, predictions) if settings.show else None)


def _expanded(photos: Iterable[Path]) -> Iterable[str]:
    for path in photos:
        if path.is_dir():
            below = list(photos_below(path))
            if not below:
                raise DataError(f"{printable(path)} has no photos", "give photos, or a folder of them")
            yield from below
        elif path.exists():
            yield str(path)
        else:
            raise DataError(f"there is no photo {printable(path)}", "check the path")


def _write_csv(path: Path, predictions: Sequence[Prediction]) -> None:
    """One row a photo: the best class, then the others; every row has every column."""
    places = max(len(prediction.top) for prediction in predictions)
    columns = ["path", "label", "probability", "error"]
    columns += [f"{what}{i}" for i in range(2, places + 1) for what in ("label", "probability")]
    rows = []
    for p in predictions:
        row = [p.path, p.label, p.probability, p.error]
        row += [value for c in p.top[1:] for value in (c.label, c.probability)]
        rows.append(row + [None] * (len(columns) - len(row)))
    write_csv(path, columns, rows)


def _picture(settings: PredictSettings, predictions: list[Prediction]) -> Path:
    shown = [prediction for prediction in predictions if not prediction.error][:MOST_SHOWN]
    images = []
    for prediction in shown:
        photo = open_photo(prediction.path)
        photo.thumbnail((1200, 1200) if len(shown) == 1 else (320, 320))  # a camera's photo is far more than is drawn
        images.append(photo)
    if len(shown) == 1:
        top = shown[0].top
        content = figures.answer_png(images[0], [c.label for c in top], [c.probability for c in top])
    else:
        titles = [f"{printable(str(p.label))}  {p.probability:.1%}" for p in shown]
        more = f"the first {len(shown)} of {len(predictions)} photos" if len(predictions) > len(shown) else ""
        content = figures.photos_png(images, titles, more)
    folder = new_run(settings.root, None, stem="predict").folder
    write_atomic(folder / "predictions.png", content)
    return folder / "predictions.png"
