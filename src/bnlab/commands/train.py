"""`bnlab train`: train a classifier, or resume a training."""

from bnlab.config import load_settings
from bnlab.errors import UsageError
from bnlab.options import TrainOptions
from bnlab.progress import Progress
from bnlab.report.page import write_run_page
from bnlab.training import run as training_run
from bnlab.training.run import TrainingResult


def run(options: TrainOptions, progress: Progress) -> TrainingResult:
    """Train a new run and write its report."""
    if options.data is None:
        raise UsageError("DATA is missing", "pass a folder of classes, or --resume to continue a run")
    result = training_run.train(
        options.data,
        load_settings(options.recipe, options.recipe_keys),
        root=options.runs,
        name=options.name,
        strict=options.strict,
        progress=progress,
    )
    write_run_page(result.run, result.evaluation, result.rows, str(result.frozen))
    return result


def resume(options: TrainOptions, progress: Progress) -> TrainingResult:
    """Continue the run of that name, or the latest, and write its report."""
    result = training_run.resume(options.name, root=options.runs, changes=options.recipe_keys, progress=progress)
    write_run_page(result.run, result.evaluation, result.rows, str(result.frozen))
    return result
