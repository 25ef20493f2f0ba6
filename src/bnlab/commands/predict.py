"""`bnlab predict`: classify photos."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

from bnlab.classifier.ensemble import Ensemble, open_classifiers
from bnlab.classifier.predict import Prediction
from bnlab.data.photo_file import MemoryPhoto, PhotoReader
from bnlab.data.photo_input import PhotoInput, photos_of
from bnlab.data.scan import Refusal, Result, photos_below, report_refused, report_system_folders
from bnlab.errors import DataError, PhotoError, UsageError, plural, printable
from bnlab.files import storage_errors, write_atomic, write_csv
from bnlab.options import PredictOptions
from bnlab.progress import LoggedProgress, Progress
from bnlab.report import figures
from bnlab.runs import new_run

MOST_SHOWN = 60  # photos in one picture
_MOST_COUNTED = 5  # classes in the line that a result prints as


@dataclass(frozen=True, kw_only=True)
class PredictResult(Result):
    """The predictions in the order of the photos, as a list has them: `for prediction in result`, `result[0]`."""

    predictions: list[Prediction]
    picture: Path | None = None
    """a picture of the photos, if one was requested"""

    def __len__(self) -> int:
        return len(self.predictions)

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self.predictions)

    def __getitem__(self, index: int) -> Prediction:
        return self.predictions[index]

    def __repr__(self) -> str:
        """How many photos there are of the classes that most were predicted as."""
        counts = Counter(str(prediction.label) for prediction in self.predictions if prediction.error is None)
        most = [f"{number} {label}" for label, number in counts.most_common(_MOST_COUNTED)]
        others = [f"{counts.total() - sum(n for _, n in counts.most_common(_MOST_COUNTED))} of other classes"]
        return self._line(plural(len(self), "photo"), *most, *(others if len(counts) > _MOST_COUNTED else []))

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(prediction) for prediction in self.predictions]


def run(
    options: PredictOptions,
    progress: Progress,
    *,
    ensemble: Ensemble | None = None,
    photos: Iterable[PhotoInput] | None = None,
) -> PredictResult:
    """Classify `photos` (default: those of the options), which may be folders, too.

    `ensemble` is what `options.classifier` names, if it is loaded already.
    """
    progress = LoggedProgress(progress)
    unreadable: list[Refusal] = []
    given = options.photos if photos is None else photos
    expanded: Iterable[PhotoInput] = _expanded(given, unreadable, progress)
    if isinstance(given, Sequence):
        expanded = list(expanded)  # so that a path that does not exist is found before any work is done
    opened: list[str | MemoryPhoto] = []
    if options.show:  # they are opened again for the picture
        opened = [photo for some in photos_of(expanded) for photo in some]
        expanded = cast(list[PhotoInput], opened)
    if options.csv:
        with storage_errors(options.csv):
            if options.csv.exists():
                raise UsageError(f"{printable(options.csv)} exists already", "pass a new file as csv")
            options.csv.parent.mkdir(parents=True, exist_ok=True)
    ensemble = ensemble or open_classifiers(options.classifier, options.device)
    number = len(ensemble.classes)
    if options.top > number and options.top != PredictOptions.model_fields["top"].default:
        progress.warn(f"top {options.top} has the effect of top {number}: the classifier has {plural(number, 'class')}")
    predictions = ensemble.predict(
        expanded,
        top=options.top,
        batch_size=options.batch_size,
        max_megapixels=options.max_megapixels,
        progress=progress,
    )
    refused = [Refusal(p.path, p.error) for p in predictions if p.error]
    report_refused([*unreadable, *refused], strict=options.strict, progress=progress)
    if refused and len(refused) == len(predictions):
        raise PhotoError(refused[0].path, refused[0].reason)
    if options.csv:
        _write_csv(options.csv, predictions)
    picture = None
    if options.show:
        reader = PhotoReader(ensemble.members[0].card.preprocessing.pixel_range, options.max_megapixels)
        picture = _picture(options, predictions, opened, reader)
    return PredictResult(
        predictions=predictions,
        picture=picture,
        warnings=tuple(progress.warnings),
        refused=(*unreadable, *refused),
    )


def _expanded(photos: Iterable[PhotoInput], unreadable: list[Refusal], progress: Progress) -> Iterator[PhotoInput]:
    """The photos, and those below folders. Folders that cannot be read are added to `unreadable`."""
    for photo in photos:
        if not isinstance(photo, str | PathLike):
            yield photo
            continue
        path = Path(photo)
        if path.is_dir():
            known = len(unreadable)
            below = list(photos_below(path, unreadable))
            report_system_folders(path, progress)
            if not below:
                why = (
                    f" ({printable(unreadable[known].path)}: {unreadable[known].reason})" if unreadable[known:] else ""
                )
                raise DataError(f"{printable(path)} has no photos{why}", "pass photos, or a folder of them")
            yield from below
        elif path.exists():
            yield str(path)
        else:
            raise DataError(f"there is no photo {printable(path)}", "check the path")


def _write_csv(path: Path, predictions: Sequence[Prediction]) -> None:
    """One row a photo, the best class first; every row has every column."""
    places = max((len(prediction.top) for prediction in predictions), default=0)
    columns = ["path", "label", "probability", "error"]
    columns += [f"{what}{i}" for i in range(2, places + 1) for what in ("label", "probability")]
    rows = []
    for p in predictions:
        row = [p.path, p.label, p.probability, p.error]
        row += [value for c in p.top[1:] for value in (c.label, c.probability)]
        rows.append(row + [None] * (len(columns) - len(row)))
    write_csv(path, columns, rows)


def _picture(
    options: PredictOptions, predictions: list[Prediction], opened: Sequence[str | MemoryPhoto], reader: PhotoReader
) -> Path:
    usable = [pair for pair in zip(predictions, opened, strict=True) if not pair[0].error][:MOST_SHOWN]
    shown = [prediction for prediction, _ in usable]
    images = []
    for _, source in usable:
        photo = reader.open(source)
        photo.thumbnail((1200, 1200) if len(shown) == 1 else (320, 320))  # photos of cameras are far larger
        images.append(photo)
    if len(shown) == 1:
        top = shown[0].top
        content = figures.answer_png(images[0], [c.label for c in top], [c.probability for c in top])
    else:
        titles = [f"{printable(str(p.label))}  {p.probability:.1%}" for p in shown]
        more = f"the first {len(shown)} of {len(predictions)} photos" if len(predictions) > len(shown) else ""
        content = figures.photos_png(images, titles, more)
    folder = new_run(options.runs, None, stem="predict").folder
    write_atomic(folder / "predictions.png", content)
    return folder / "predictions.png"
