"""The verbs from photos to a classifier and its answers: split, train, evaluate, predict and demo."""

from pathlib import Path
from typing import Annotated, Any

import typer

from bnlab.cli import render
from bnlab.cli.app import app
from bnlab.cli.console import ScreenProgress, err, show_result
from bnlab.cli.parameters import Json, takes
from bnlab.config import parse_assignments
from bnlab.errors import plural, printable, quoted
from bnlab.options import DemoOptions, EvaluateOptions, PredictOptions, SplitOptions, TrainOptions

# Keys of the recipe that are options of `train`; all others are set with --set.
TRAIN_KEYS = (
    *("network", "epochs", "time", "batch_size", "size", "learning_rate", "patience", "val", "split_seed", "seed"),
    *("init", "freeze", "freeze_bn", "device", "workers", "compile"),
)


@app.command()
@takes(SplitOptions)
def split(
    *,
    link: Annotated[bool, typer.Option("--link", help="Write hard links, or copies where the disk has none.")] = False,
    copy: Annotated[bool, typer.Option("--copy", help="Write copies instead of hard links.")] = False,
    list_only: Annotated[bool, typer.Option("--list", help="Write split.csv only.")] = False,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Split a folder of classes into train, val and test.

    The split of a photo follows from its content and the seed, so it does not change when other photos are added or
    removed. A small class that would have no photo in a split has its nearest one moved there. Exact and near
    duplicates go to the same split; duplicates with different labels are named.
    """
    from bnlab.commands import split as command

    modes: list[Any] = [mode for mode, chosen in (("link", link), ("copy", copy), ("list", list_only)) if chosen]
    if len(modes) > 1:
        raise typer.BadParameter(f"pass --{modes[0]} or --{modes[1]}, not both")
    options = SplitOptions(**given, how=modes[0] if modes else "link")
    result = command.run(options, ScreenProgress())
    data = options.into / "split.csv" if options.how == "list" else options.into
    done = "written" if result.written else "nothing to do, the split is there already"
    last = f"{printable(data)}: {done}. Next: bnlab train {quoted(data)}"
    show_result(as_json, result.to_json(), render.split_table(result), last)


@app.command()
@takes(TrainOptions, recipe_options=TRAIN_KEYS)
def train(
    *,
    context: typer.Context,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the latest run, or the one named by --name, where it stopped.")
    ] = False,
    find_lr: Annotated[
        bool, typer.Option("--find-lr", help="Only try learning rates, for 200 steps, and suggest one.")
    ] = False,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Train a classifier; the run goes to runs/NAME.

    An option that is left out has the value of the recipe; defaults in parentheses are those of the recipe `default`.
    Ctrl-C saves the training. --resume continues it, even after a kill, and ends in the same weights, bit for bit. With
    a larger --epochs it trains a run longer, also a finished one, unless its schedule is one-cycle.
    --find-lr keeps no classifier: it plots the loss by learning rate, in runs/find-lr.
    """
    from bnlab.commands import train as command

    keys = {key: value for key in TRAIN_KEYS if (value := given.pop(key)) is not None}
    keys |= parse_assignments(given.pop("recipe_keys") or [])
    options = TrainOptions(**given, recipe_keys=keys)
    if resume:
        _check_resume(options, find_lr=find_lr)
        result = command.resume(options, ScreenProgress(), context.obj)
    elif find_lr:
        _find_lr(options, as_json=as_json)
        return
    else:
        result = command.run(options, ScreenProgress(), context.obj)
    low, high = result.evaluation.top1_interval
    best = f"best val accuracy {result.val_top1:.1%} (95% interval {low:.1%} to {high:.1%}, n = {result.evaluation.n}) "
    best += f"in {plural(result.epochs, 'epoch')}, {result.seconds:.0f} s"
    if result.seen.train:
        best += f"; earlier trainings were trained on {result.seen.train} of these photos, so this may be too high"
    last = f"{result.run.folder}: report.html shows it. Next: bnlab predict {quoted(result.run.best)} PHOTO"
    show_result(as_json, result.to_json(), best, last)


def _check_resume(options: TrainOptions, *, find_lr: bool) -> None:
    fixed = ["recipe"] * (options.recipe != "default") + ["find-lr"] * find_lr + ["strict"] * options.strict
    if fixed:
        raise typer.BadParameter(f"--resume uses the recipe and photos of the run: leave out --{fixed[0]}")


def _find_lr(options: TrainOptions, *, as_json: bool) -> None:
    from bnlab.commands import train as command

    result = command.find_lr(options, ScreenProgress())
    suggested = result.suggestion.suggested
    last = f"{printable(str(result.figure))} shows it. "
    if suggested is None:
        last += "It suggests none: see the curve, or keep the learning rate of the recipe."
    else:
        is_default = options.recipe == "default" and not options.recipe_keys.keys() - {"learning_rate"}
        others = "" if is_default else " and the other options as here"
        last += f"Next: bnlab train {quoted(str(options.data))} --learning-rate {suggested:g}{others}"
    show_result(as_json, result.to_json(), render.learning_rate_table(result), last)


@app.command()
@takes(EvaluateOptions)
def evaluate(
    *,
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="CLASSIFIER... DATA",
            help="A classifier file or run folder, or several, which are evaluated as an ensemble: their probabilities "
            "are averaged. Then the photos: a split folder, a split.csv, or a folder of classes.",
        ),
    ],
    as_json: Json = False,
    **given: Any,
) -> None:
    """Measure a classifier, or an ensemble of several, on photos whose classes are known.

    Writes evaluation.json, predictions.csv, report.html, the confusion matrix, the reliability diagram and a picture
    of the worst mistakes to runs/NAME.
    """
    from bnlab.commands import evaluate as command

    *classifiers, data = paths
    if data.suffix == ".safetensors" and not data.is_dir():
        raise typer.BadParameter(f"DATA is missing: pass photos after the classifier file {printable(data)}")
    if not classifiers:
        raise typer.BadParameter(f"CLASSIFIER is missing: pass a classifier file before {printable(data)}")
    result = command.run(EvaluateOptions(classifiers=classifiers, data=data, **given), ScreenProgress())
    show_result(as_json, result.to_json(), render.evaluation_table(result), f"{result.folder}: report.html shows it.")


@app.command()
@takes(PredictOptions)
def predict(*, as_json: Json = False, **given: Any) -> None:
    """Classify photos, and print the predictions in the order given."""
    from bnlab.commands import predict as command

    result = command.run(PredictOptions(**given), ScreenProgress())
    last = ""
    if result.picture:
        last = f"{result.picture} shows the photos with their predictions."
        if err.is_terminal and not as_json:
            typer.launch(str(result.picture))
    show_result(as_json, result.to_json(), render.prediction_table(result), last)


@app.command()
@takes(DemoOptions)
def demo(*, as_json: Json = False, **given: Any) -> None:
    """Train, evaluate and predict on handwritten digits, with and without BN.

    It takes about a minute. The digits come with scikit-learn; nothing is downloaded. Everything goes to runs/demo.
    """
    from bnlab.commands import demo as command

    result = command.run(DemoOptions(**given), ScreenProgress())
    last = f"{result.report} shows it. For your own photos, make one sub-folder for each class, then:\n"
    last += "  bnlab split PHOTOS --into DATA\n  bnlab train DATA"
    show_result(as_json, result.to_json(), render.demo_table(result), last)
