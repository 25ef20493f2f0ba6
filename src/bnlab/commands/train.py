"""`bnlab train`: train a classifier, resume a training, or (with --find-lr) try learning rates and suggest one."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bnlab import no_effect
from bnlab.config import Settings, load_settings
from bnlab.data.scan import Result
from bnlab.errors import UsageError, did_you_mean, printable
from bnlab.files import write_atomic, write_csv
from bnlab.machine import versions
from bnlab.no_effect import Rule
from bnlab.options import TrainOptions
from bnlab.progress import LoggedProgress, Progress
from bnlab.recipe import LENGTH_KEYS, MACHINE_KEYS, Recipe
from bnlab.report import figures
from bnlab.report.page import write_run_page
from bnlab.runs import check_free, new_run
from bnlab.training import run as training_run
from bnlab.training.lr_finder import LrRangeTest, Suggestion, lr_range_test, suggest
from bnlab.training.session import TrainingResult

FIND_LR_RULES: tuple[Rule[Settings], ...] = (
    Rule("learning_rate", "the learning-rate finder tries rates from low to high", lambda _: True),
    Rule(
        "epochs steps time plan schedule warmup step_every step_factor decay_factor decay_epochs start_size",
        "the learning-rate finder has a schedule and a length that are fixed",
        lambda _: True,
    ),
    Rule(
        "patience ema recalibration_images flip_tta validate_every norm_momentum bn_monitor resize crop_fraction",
        "the learning-rate finder does not validate",
        lambda _: True,
    ),
    Rule("cache cache_gigabytes checkpoint_seconds", "the learning-rate finder keeps nothing", lambda _: True),
)


@dataclass(frozen=True, kw_only=True)
class FindLrResult(Result):
    test: LrRangeTest
    suggestion: Suggestion
    data: Path
    figure: Path | None = None
    """find-lr.png, if it was written"""
    table: Path | None = None
    """find-lr.csv, if it was written"""

    def __repr__(self) -> str:
        found = self.suggestion
        rate = "no learning rate suggested" if found.suggested is None else f"suggested {found.suggested:g}"
        return self._line(f"{rate} ({found.reason})", *([str(self.figure)] if self.figure else []))

    def to_json(self) -> dict[str, Any]:
        test, rates = self.test, self.test.curve.rates
        return {
            **asdict(self.suggestion),
            "diverged_at": test.curve.diverged_at,
            "lowest_rate": rates[0],
            "highest_rate": rates[-1],
            "steps": len(rates),
            **{
                key: getattr(test.recipe, key)
                for key in ("network", "size", "batch_size", "accumulate", "split_seed", "seed")
            },
            **{key: getattr(test, key) for key in ("device", "classes", "photos")},
            "data": str(self.data),
            "figure": self.figure and str(self.figure),
            "table": self.table and str(self.table),
            "versions": versions(),
        }


def run(options: TrainOptions, progress: Progress, began: float | None = None) -> TrainingResult:
    """Train a new run and write its report. A time budget counts from `began`, a time.monotonic() (default: now)."""
    progress = LoggedProgress(progress)
    result = training_run.train(
        _given_data(options),
        load_settings(options.recipe, options.recipe_keys),
        root=options.runs,
        name=options.name,
        strict=options.strict,
        progress=progress,
        report=_write_page,
        began=began,
    )
    return replace(result, warnings=tuple(progress.warnings))


def resume(options: TrainOptions, progress: Progress, began: float | None = None) -> TrainingResult:
    """Continue the run of that name, or the latest, and write its report. `began` is as for `run`.

    Raises:
        UsageError: a key of the recipe is given that a resume does not change.
    """
    progress = LoggedProgress(progress)
    for key in options.recipe_keys:
        if key not in MACHINE_KEYS | LENGTH_KEYS:
            known = sorted(MACHINE_KEYS | LENGTH_KEYS)
            remedy = f"leave {key} out" if key in Recipe.model_fields else did_you_mean(key, known)
            raise UsageError(f"a resume cannot change '{printable(key)}'", remedy)
    result = training_run.resume(
        options.name,
        root=options.runs,
        changes=options.recipe_keys,
        progress=progress,
        data=options.data,
        report=_write_page,
        began=began,
    )
    return replace(result, warnings=tuple(progress.warnings))


def find_lr(options: TrainOptions, progress: Progress, *, write: bool = True) -> FindLrResult:
    """Try learning rates on a network that is not kept; `write` find-lr.png and find-lr.csv to a new run folder."""
    progress = LoggedProgress(progress)
    data = _given_data(options)
    check_free(options.runs, options.name)
    settings = load_settings(options.recipe, options.recipe_keys)
    unused = no_effect.sentences(FIND_LR_RULES, settings, no_effect.turned_on(settings.recipe, settings.own))
    for sentence in unused.values():
        progress.warn(sentence)
    settings = replace(settings, origin={key: settings.origin[key] for key in settings.origin.keys() - unused})
    test = lr_range_test(data, settings, strict=options.strict, progress=progress)
    result = FindLrResult(
        test=test, suggestion=suggest(test.curve), data=data, warnings=tuple(progress.warnings), refused=test.refused
    )
    return _with_files(result, options) if write else result


def _with_files(result: FindLrResult, options: TrainOptions) -> FindLrResult:
    """Write the plot and the table to a new run folder."""
    curve, found = result.test.curve, result.suggestion
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
        "a tenth of the rate of the lowest loss": found.tenth_of_minimum,
        "diverged": curve.diverged_at,
    }
    recipe = result.test.recipe
    heading = f"{recipe.network}, {recipe.size} px, batches of {recipe.batch_size}, {printable(result.data.name)}"
    write_atomic(figure, figures.lr_range_test_png(curve.rates, curve.losses, curve.smoothed, marks, heading))
    return replace(result, figure=figure, table=table)


def _write_page(result: TrainingResult) -> None:
    seen = result.seen.sentences("the file in init was", "photos of val")
    write_run_page(result.run, result.evaluation, result.rows, str(result.frozen), seen)


def _given_data(options: TrainOptions) -> Path:
    if options.data is None:
        raise UsageError("DATA is missing", "pass a folder of classes, or continue a run: bnlab train --resume")
    return options.data
