"""`bnlab recalibrate`: measure the statistics of a network's normalisation layers anew, and write a new file."""

from dataclasses import dataclass
from typing import Any

from bnlab.classifier.opened import (
    check_classes,
    check_output,
    measured_on,
    open_model,
    photo_batches,
    save_model,
)
from bnlab.data.dataset import open_evaluation_data
from bnlab.data.photos import Photos
from bnlab.data.scan import Refusal, Result, report_refused
from bnlab.errors import DataError, UsageError, plural, printable
from bnlab.health import Repaired, repair, repairs
from bnlab.health.gather.layers import find_layers
from bnlab.machine import choose_device, memory_errors
from bnlab.options import RecalibrateOptions
from bnlab.progress import LoggedProgress, Progress


@dataclass(frozen=True, kw_only=True)
class RecalibrateResult(Result):
    options: RecalibrateOptions
    model: str
    measured: int
    """how many photos the statistics were measured on"""
    measured_split: str
    scored_split: str
    """the split of the photos by which accuracy was measured"""
    repaired: Repaired

    def to_json(self) -> dict[str, Any]:
        (one,) = self.repaired.applied
        comparison = self.repaired.comparison
        return {
            "model": self.model,
            "output": str(self.options.output),
            "layers": list(one.layers),
            "skipped": dict(one.skipped),
            "measured_on": {"split": self.measured_split, "images": self.measured},
            "accuracy": comparison and {"split": self.scored_split, **comparison.to_json()},
            "refused": [{"path": refusal.path, "reason": refusal.reason} for refusal in self.refused],
        }


def run(options: RecalibrateOptions, progress: Progress) -> RecalibrateResult:
    """Recalibrate a copy, compare it with the network on the same photos, and write it."""
    progress = LoggedProgress(progress)
    check_output(options.output, options.model, "output")
    model = open_model(options)
    if not find_layers(model.network):
        raise UsageError(
            f"{model.name} has no normalisation layer with statistics", "pass a network with batch normalisation"
        )
    refused: list[Refusal] = []
    measured_split, photos, scored_split, scored = _splits(options, refused, progress)
    classes = model.classes or tuple(sorted(set(photos.labels)))
    for some in (photos, scored):
        check_classes(options.data, some, classes, model)
    if len(photos) < 2 or not scored:
        raise DataError(
            f"{printable(options.data)} has {plural(len(photos), 'photo')} in {measured_split}",
            "measure statistics on two photos or more; 1,000 to 10,000 suffice",
        )

    model.network.to(choose_device(options.device)).eval()
    measured, own = (photo_batches(model, some, classes, options) for some in (photos, scored))
    held_out = scored_split != measured_split
    with memory_errors(options.batch_size, model.preprocessing.size):
        repaired = repair(
            model.network,
            own,
            [repairs.recalibrate(layer_by_layer=options.layer_by_layer)],
            calibration=measured if held_out else None,
        )
    found = own if not held_out else measured
    refused += found.refused + (own.refused if held_out else [])
    report_refused(refused, strict=options.strict, progress=progress)
    (one,) = repaired.applied
    if not one.layers:
        reasons = "; ".join(dict.fromkeys(one.skipped.values()))
        raise UsageError(
            f"no layer of {model.name} can be recalibrated ({reasons})",
            "unfreeze the layers, or pass a network whose layers keep running statistics",
        )
    if not held_out:
        progress.warn(
            f"accuracy is measured on the photos that gave the statistics, since {printable(options.data)} has no "
            "other split: a folder from bnlab split has"
        )
    card = model.card
    if card is not None:
        comparison = repaired.comparison
        metrics = (
            {"split": scored_split, "n": comparison.n, "accuracy": comparison.after}
            if held_out and comparison is not None
            else {}
        )
        card = measured_on(card, found.used, metrics)
    save_model(options.output, model, repaired.model, card)
    return RecalibrateResult(
        options=options,
        model=model.name,
        measured=len(found.used),
        measured_split=measured_split,
        scored_split=scored_split,
        repaired=repaired,
        warnings=tuple(progress.warnings),
        refused=tuple(refused),
    )


def _splits(options: RecalibrateOptions, refused: list[Refusal], progress: Progress) -> tuple[str, Photos, str, Photos]:
    """The split to measure on and the one to score, each with its photos; the same one if there is no other.

    Of train, val and test, the first is measured on, and the last is scored.
    """
    found: dict[str, Photos] = {}
    for split in ("train", "val", "test"):
        unreadable: list[Refusal] = []
        try:
            found[split] = open_evaluation_data(options.data, split, unreadable, None)[1]
        except DataError:  # there is no such split, or no data at all, which the next call says
            continue
        refused += [one for one in unreadable if one not in refused]
    if not found:
        split, photos = open_evaluation_data(options.data, None, refused, progress)
        found[split] = photos
    first, last = next(iter(found)), [*found][-1]
    return first, found[first], last, found[last]
