"""`bnlab train`: train a classifier, resume a training, or (with --find-lr) try learning rates and suggest one."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bnlab.config import load_settings
from bnlab.errors import UsageError, printable
from bnlab.files import write_atomic, write_csv
from bnlab.machine import versions
from bnlab.options import TrainOptions
from bnlab.progress import Progress
from bnlab.report import figures
from bnlab.report.page import write_run_page
from bnlab.runs import check_free, new_run
from bnlab.training import run as training_run
from bnlab.training.lr_finder import LrRangeTest, Suggestion, lr_range_test, suggest
from bnlab.training.run import TrainingResult


@dataclass(frozen=True, kw_only=True)
class FindLrResult:
    test: LrRangeTest
    suggestion: Suggestion
    data: Path
    figure: Path
    table: Path

    def to_json(self) -> dict[str, Any]:
        test, rates = self.test, self.test.curve.rates
        return {
            **asdict(self.suggestion),
            "diverged_at": test.curve.diverged_at,
            "lowest_rate": rates[0],
            "highest_rate": rates[-1],
            "steps": len(rates),
            **{key: getattr(test.recipe, key) for key in ("network", "size", "batch_size", "seed")},
            **{key: getattr(test, key) for key in ("device", "classes", "photos")},
            **{key: str(getattr(self, key)) for key in ("data", "figure", "table")},
            "versions": versions(),
        }


def run(options: TrainOptions, progress: Progress, began: float | None = None) -> TrainingResult:
    """Train a new run and write its report. A time budget counts from `began`, a time.monotonic() (default: now)."""
    return training_run.train(
        _given_data(options),
        load_settings(options.recipe, options.recipe_keys),
        root=options.runs,
        name=options.name,
        strict=options.strict,
        progress=progress,
        report=_write_report,
        began=began,
    )


def resume(options: TrainOptions, progress: Progress, began: float | None = None) -> TrainingResult:
    """Continue the run of that name, or the latest, and write its report. `began` is as for `run`."""
    return training_run.resume(
        options.name,
        root=options.runs,
        changes=options.recipe_keys,
        progress=progress,
        report=_write_report,
        began=began,
    )


def _write_report(result: TrainingResult) -> None:
    write_run_page(result.run, result.evaluation, result.rows, str(result.frozen))


def find_lr(options: TrainOptions, progress: Progress) -> FindLrResult:
    """Try learning rates on a network that is not kept; write find-lr.png and find-lr.csv to a new run folder."""
    data = _given_data(options)
    check_free(options.runs, options.name)
    settings = load_settings(options.recipe, options.recipe_keys)
    if "learning_rate" in settings.own:
        progress.warn("learning_rate has no effect: --find-lr tries learning rates from low to high")
    if "time" in settings.own:
        progress.warn("time has no effect: --find-lr makes as many steps as it needs")
    test = lr_range_test(data, settings, strict=options.strict, progress=progress)
    curve, found = test.curve, suggest(test.curve)
    folder = new_run(options.runs, options.name, stem="find-lr").folder
    figure, table = folder / "find-lr.png", folder / "find-lr.csv"
    rows = zip(curve.rates, curve.losses, curve.smoothed, strict=True)
    write_csv(
        table,
        ("step", "learning_rate", "loss", "smoothed_loss"),
        ([step, *(f"{number:.6g}" for number in row)] for step, row in enumerate(rows, start=1)),
    )
    marks = {
        "suggested": found.suggested,
        "steepest": found.steepest,
        "lowest": None if found.suggested else found.lowest,
        "a tenth of it": found.tenth_of_minimum,
        "diverged": curve.diverged_at,
    }
    recipe = test.recipe
    heading = f"{recipe.network}, {recipe.size} px, batches of {recipe.batch_size}, {printable(data.name)}"
    write_atomic(figure, figures.lr_range_test_png(curve.rates, curve.losses, curve.smoothed, marks, heading))
    return FindLrResult(test=test, suggestion=found, data=data, figure=figure, table=table)


def _given_data(options: TrainOptions) -> Path:
    if options.data is None:
        raise UsageError("DATA is missing", "pass a folder of classes, or --resume to continue a run")
    return options.data
