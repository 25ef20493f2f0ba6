"""`bnlab train --find-lr`: try learning rates on DATA and suggest one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnlab.config import load_settings
from bnlab.errors import UsageError, printable
from bnlab.files import write_atomic, write_csv
from bnlab.machine import versions
from bnlab.options import TrainOptions
from bnlab.progress import Progress
from bnlab.report import figures
from bnlab.runs import check_free, new_run
from bnlab.training.lr_finder import LrRangeTest, Suggestion, lr_range_test, suggest

_SUGGESTION_KEYS = ("suggested", "reason", "steepest", "lowest", "tenth_of_minimum")


@dataclass(frozen=True, kw_only=True)
class FindLrResult:
    """The learning rates that were tried, the suggestion, and the folder with the figure and the table."""

    test: LrRangeTest
    suggestion: Suggestion
    folder: Path
    data: Path

    @property
    def figure(self) -> Path:
        return self.folder / "find-lr.png"

    @property
    def table(self) -> Path:
        return self.folder / "find-lr.csv"

    def to_json(self) -> dict[str, Any]:
        """The document of `bnlab train --find-lr --json`."""
        found, test = self.suggestion, self.test
        return {
            **{key: getattr(found, key) for key in _SUGGESTION_KEYS},
            "diverged_at": test.curve.diverged_at,
            "lowest_rate": test.curve.rates[0],
            "highest_rate": test.curve.rates[-1],
            "steps": len(test.curve.rates),
            **{key: getattr(test.recipe, key) for key in ("network", "size", "batch_size", "seed")},
            "device": test.device,
            "classes": test.classes,
            "photos": test.photos,
            "data": str(self.data),
            "figure": str(self.figure),
            "table": str(self.table),
            "versions": versions(),
        }


def run(options: TrainOptions, progress: Progress) -> FindLrResult:
    """Try learning rates on a network that is not kept; write find-lr.png and find-lr.csv to a new run folder."""
    if options.data is None:
        raise UsageError("DATA is missing", "pass a folder of classes")
    check_free(options.runs, options.name)
    settings = load_settings(options.recipe, options.recipe_keys)
    if "learning_rate" in settings.own:
        progress.warn("learning_rate has no effect: --find-lr tries learning rates from low to high")
    test = lr_range_test(options.data, settings, strict=options.strict, progress=progress)
    curve, found = test.curve, suggest(test.curve)
    folder = new_run(options.runs, options.name, stem="find-lr").folder
    result = FindLrResult(test=test, suggestion=found, folder=folder, data=options.data)
    rows = zip(range(1, len(curve.rates) + 1), curve.rates, curve.losses, curve.smoothed, strict=True)
    write_csv(
        result.table,
        ("step", "learning_rate", "loss", "smoothed_loss"),
        ((step, f"{rate:.6g}", f"{loss:.6g}", f"{smoothed:.6g}") for step, rate, loss, smoothed in rows),
    )
    marks = {
        "suggested": found.suggested,
        "steepest": found.steepest,
        "lowest": None if found.suggested else found.lowest,
        "a tenth of it": found.tenth_of_minimum,
        "diverged": curve.diverged_at,
    }
    title = f"{test.recipe.network}, {test.recipe.size} px, batches of {test.recipe.batch_size}"
    heading = f"{title}, {printable(options.data.name)}"
    write_atomic(result.figure, figures.lr_range_test_png(curve.rates, curve.losses, curve.smoothed, marks, heading))
    return result
