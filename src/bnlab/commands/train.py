"""`bnlab train`: train a classifier, resume a training, or (with --find-lr) try learning rates and suggest one."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bnlab import no_effect
from bnlab.config import Settings, load_settings
from bnlab.errors import UsageError, printable
from bnlab.files import write_atomic, write_csv
from bnlab.machine import versions
from bnlab.no_effect import Rule
from bnlab.options import TrainOptions
from bnlab.progress import Progress
from bnlab.recipe import LENGTH_KEYS, MACHINE_KEYS
from bnlab.report import figures
from bnlab.report.page import write_run_page
from bnlab.runs import check_free, new_run
from bnlab.training import run as training_run
from bnlab.training.lr_finder import LrRangeTest, Suggestion, lr_range_test, suggest
from bnlab.training.run import TrainingResult

FIND_LR_RULES: tuple[Rule[Settings], ...] = (
    Rule("learning_rate", "--find-lr tries learning rates from low to high", lambda _: True),
    Rule(
        "epochs steps time schedule warmup step_every step_factor decay_factor decay_epochs start_size",
        "--find-lr has a schedule and a length that are fixed",
        lambda _: True,
    ),
    Rule(
        "patience ema recalibration_images flip_tta validate_every norm_momentum bn_monitor resize crop_fraction",
        "--find-lr does not validate",
        lambda _: True,
    ),
    Rule("cache cache_gigabytes checkpoint_seconds", "--find-lr keeps nothing", lambda _: True),
)


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
            **{
                key: getattr(test.recipe, key)
                for key in ("network", "size", "batch_size", "accumulate", "split_seed", "seed")
            },
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
        report=_write_page,
        began=began,
    )


def resume(options: TrainOptions, progress: Progress, began: float | None = None) -> TrainingResult:
    """Continue the run of that name, or the latest, and write its report. `began` is as for `run`.

    Raises:
        UsageError: a key of the recipe is given that a resume does not change.
    """
    fixed = [key for key in options.recipe_keys if key not in MACHINE_KEYS | LENGTH_KEYS]
    if fixed:
        raise UsageError("a resume uses the recipe of the run", f"leave out --{fixed[0].replace('_', '-')}")
    return training_run.resume(
        options.name,
        root=options.runs,
        changes=options.recipe_keys,
        progress=progress,
        data=options.data,
        report=_write_page,
        began=began,
    )


def find_lr(options: TrainOptions, progress: Progress) -> FindLrResult:
    """Try learning rates on a network that is not kept; write find-lr.png and find-lr.csv to a new run folder."""
    data = _given_data(options)
    check_free(options.runs, options.name)
    settings = load_settings(options.recipe, options.recipe_keys)
    unused = no_effect.sentences(FIND_LR_RULES, settings, no_effect.turned_on(settings.recipe, settings.own))
    for sentence in unused.values():
        progress.warn(sentence)
    settings = replace(settings, origin={key: settings.origin[key] for key in settings.origin.keys() - unused})
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


def _write_page(result: TrainingResult) -> None:
    seen = result.seen.sentences("the file in init was", "photos of val")
    write_run_page(result.run, result.evaluation, result.rows, str(result.frozen), seen)


def _given_data(options: TrainOptions) -> Path:
    if options.data is None:
        raise UsageError("DATA is missing", "pass a folder of classes, or --resume to continue a run")
    return options.data
