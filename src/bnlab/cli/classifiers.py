"""The verbs of the main job: from photos to a classifier, and what it says."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bnlab.cli.app import app
from bnlab.cli.console import err, run_command, show_result
from bnlab.cli.options import BatchSize, ClassifierFile, Crops, Device, Json, SplitName, Strict, Workers
from bnlab.errors import plural, printable, quoted

if TYPE_CHECKING:
    from bnlab.config import Settings


@app.command("split")
def split_verb(
    photos: Annotated[
        Path, typer.Argument(metavar="PHOTOS", help="Folder with one sub-folder of photos for each class.")
    ],
    into: Annotated[Path, typer.Option(metavar="DATA", help="New folder for train/, val/, test/ and split.csv.")],
    val: Annotated[float, typer.Option(help="Share held out for validation.", min=0, max=1)] = 0.1,
    test: Annotated[float, typer.Option(help="Share held out for testing.", min=0, max=1)] = 0.0,
    seed: Annotated[int, typer.Option(help="Another seed, another split.")] = 0,
    link: Annotated[
        bool, typer.Option("--link", help="Hard links, copies where there are none (the default).")
    ] = False,
    copy: Annotated[bool, typer.Option("--copy", help="Copies.")] = False,
    list_only: Annotated[bool, typer.Option("--list", help="Write split.csv alone.")] = False,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Split a folder of classes into train, val and test.

    A photo's side follows from its content and the seed: it stays where it is when others come or go. Exact and near
    duplicates are kept on one side; those with different labels are named. PHOTOS is never written to.
    """
    from bnlab.cli.render import split_table
    from bnlab.commands import split

    chosen = [name for name, given in (("link", link), ("copy", copy), ("list", list_only)) if given]
    if len(chosen) > 1:
        raise typer.BadParameter(f"--{chosen[0]} and --{chosen[1]} exclude each other")
    how: Any = chosen[0] if chosen else "link"
    settings = split.SplitSettings(photos=photos, into=into, val=val, test=test, seed=seed, how=how, strict=strict)
    result = run_command(split.run, settings)
    data = into / "split.csv" if how == "list" else into
    done = "written" if result.written else "nothing to do, it is all there"
    show_result(
        as_json,
        result.to_json(),
        split_table(result),
        f"{printable(data)}: {done}. Next: bnlab train {quoted(data)}",
    )


@app.command("train")
def train_verb(
    data: Annotated[
        Path | None, typer.Argument(metavar="DATA", help="A split folder, a split.csv, or a plain folder of classes.")
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="A YAML file, or a name: default, classic, digits, and the paper's inception, bn-baseline, bn-x5, "
            "bn-x30, bn-x5-sigmoid."
        ),
    ] = "default",
    network: Annotated[
        str | None, typer.Option(help="bn_googlenet, googlenet (the same without BN), ...: bnlab net.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="How often to go through all photos.")] = None,
    time: Annotated[
        str | None, typer.Option(metavar="SPAN", help="In place of epochs: as many as fit into 20m, 1h30m, 90s ...")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Photos to a step.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the picture the network sees, in pixels.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest of the schedule.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many epochs without a better val accuracy.")
    ] = None,
    val: Annotated[float | None, typer.Option(help="Share held out where DATA is not split yet.")] = None,
    seed: Annotated[int | None, typer.Option(help="All randomness follows from it.")] = None,
    init: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Classifier file to start from (fine-tuning).")
    ] = None,
    freeze: Annotated[
        str | None,
        typer.Option(metavar="PART", help="--init: do not train the stem or the backbone (stem, backbone, none)."),
    ] = None,
    freeze_bn: Annotated[
        bool, typer.Option("--freeze-bn", help="--init: keep BN's statistics, gamma and beta as in FILE.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads that read photos; they change no result.")] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Train with torch.compile: slow to begin, for long trainings on a GPU.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other key of the recipe; may be repeated."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the run, in runs/; train, train2, ... unless given.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the latest run, or the one named by --name.")
    ] = False,
    find_lr: Annotated[
        bool, typer.Option("--find-lr", help="Only try learning rates, for 200 steps, and suggest one.")
    ] = False,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Train a classifier; the run goes to runs/NAME.

    Ctrl-C saves; --resume goes on, after a kill too, and ends in the same weights, bit for bit.
    --find-lr keeps no classifier: it draws the loss by learning rate, to runs/find-lr.
    """
    from bnlab.commands import train
    from bnlab.config import load_settings, parse_assignments
    from bnlab.recipe import MACHINE_KEYS

    given: dict[str, Any] = {
        "network": network,
        "epochs": epochs,
        "time": time,
        "batch_size": batch_size,
        "size": size,
        "learning_rate": learning_rate,
        "patience": patience,
        "val": val,
        "seed": seed,
        "init": str(init) if init else None,
        "freeze": freeze,
        "freeze_bn": freeze_bn or None,
        "device": device,
        "workers": workers,
        "compile": compile or None,
    }
    options = {key: value for key, value in given.items() if value is not None} | parse_assignments(settings or [])
    if resume:
        fixed = [key for key in options if key not in MACHINE_KEYS]
        fixed += ["recipe"] * (recipe != "default") + ["find-lr"] * find_lr + ["strict"] * strict
        if fixed or data:
            what = f"--{fixed[0].replace('_', '-')}" if fixed else "DATA"
            raise typer.BadParameter(
                f"--resume goes on with a run's own recipe and data, so {what} has no effect; leave it out"
            )
        asked = train.TrainSettings(resume=True, name=name, changes=options)
    elif data is None:
        raise typer.BadParameter("DATA is missing: give a folder of classes, or --resume to go on with a run")
    elif find_lr:
        _find_rate(data, load_settings(recipe, options), name, strict=strict, as_json=as_json)
        return
    else:
        asked = train.TrainSettings(data=data, settings=load_settings(recipe, options), name=name, strict=strict)
    result = run_command(train.run, asked)
    low, high = result.evaluation.top1_interval
    show_result(
        as_json,
        result.to_json(),
        f"best val accuracy {result.val_top1:.1%} (95% interval {low:.1%} to {high:.1%}, n = {result.evaluation.n}) "
        f"in {plural(result.epochs, 'epoch')}, {result.seconds:.0f} s",
        f"{result.run.folder}: report.html shows it. Next: bnlab predict {quoted(result.run.best)} PHOTO",
    )


def _find_rate(data: Path, recipe: "Settings", name: str | None, *, strict: bool, as_json: bool) -> None:
    from bnlab.cli.render import rate_table
    from bnlab.commands import find_lr

    settings = find_lr.FindLrSettings(data=data, settings=recipe, name=name, strict=strict)
    result = run_command(find_lr.run, settings)
    rate = result.suggestion.suggested
    if rate is None:
        last = "It suggests none: look at the curve, or keep the recipe's own rate."
    else:
        others = " and the other options as here" if recipe.origin.keys() - {"learning_rate"} else ""
        last = f"Next: bnlab train {quoted(data)} --learning-rate {rate:g}{others}"
    show_result(as_json, result.to_json(), rate_table(result), f"{printable(result.figure)} shows it. {last}")


@app.command("evaluate")
def evaluate_verb(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="CLASSIFIER... DATA",
            help="A classifier file, or several: an ensemble, whose probabilities are averaged. Then a split folder, a "
            "split.csv, or a folder of classes.",
        ),
    ],
    split: Annotated[
        SplitName | None, typer.Option(help="The side to read; else the first of test, val and all.")
    ] = None,
    crops: Annotated[
        Crops,
        typer.Option(
            help="Crops of each photo to average over, mirror images counted: 10 as Krizhevsky et al. 2012, 144 as "
            "GoogLeNet and the BN paper's figure 4. They take so many times as long."
        ),
    ] = Crops.one,
    name: Annotated[
        str | None, typer.Option(help="Of the folder in runs/; evaluate, evaluate2, ... unless given.")
    ] = None,
    batch_size: BatchSize = 32,
    workers: Workers = -1,
    device: Device = "auto",
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Measure a classifier, or an ensemble of several, on photos whose classes are known.

    Writes evaluation.json, predictions.csv, report.html, the confusion matrix, the reliability diagram and the worst
    mistakes as pictures to runs/NAME.
    """
    from bnlab.cli.render import evaluation_table
    from bnlab.commands import evaluate

    *classifiers, data = paths
    if data.suffix == ".safetensors" and not data.is_dir():
        raise typer.BadParameter(
            f"{printable(data)} is a classifier file, and DATA comes last: give the photos after it"
        )
    if not classifiers:
        raise typer.BadParameter(f"CLASSIFIER is missing: give a classifier file before {printable(data)}")
    number: Any = int(crops.value)
    settings = evaluate.EvaluateSettings(
        classifiers=tuple(classifiers),
        data=data,
        split=split.value if split else None,
        crops=number,
        name=name,
        batch_size=batch_size,
        workers=workers,
        device=device,
        strict=strict,
    )
    result = run_command(evaluate.run, settings)
    show_result(as_json, result.to_json(), evaluation_table(result), f"{result.folder}: report.html shows it.")


@app.command("predict")
def predict_verb(
    classifier: ClassifierFile,
    photos: Annotated[list[Path], typer.Argument(metavar="PHOTO...", help="Photos, and folders of photos.")],
    top: Annotated[int, typer.Option(help="How many classes to give for each photo.", min=1)] = 5,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the answers to a new CSV file too.")] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Make a picture of the photos with their answers, and open it.")
    ] = False,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Say which class each photo is, in the order given."""
    from bnlab.cli.render import prediction_table
    from bnlab.commands import predict

    settings = predict.PredictSettings(
        classifier=classifier,
        photos=tuple(photos),
        top=top,
        csv=csv,
        show=show,
        batch_size=batch_size,
        device=device,
        strict=strict,
    )
    result = run_command(predict.run, settings)
    last = ""
    if result.picture:
        last = f"{result.picture}: the photos with their answers."
        if err.is_terminal and not as_json:
            typer.launch(str(result.picture))
    show_result(as_json, result.to_json(), prediction_table(result), last)


@app.command("demo")
def demo_verb(
    seed: Annotated[int, typer.Option(help="All randomness follows from it.")] = 0,
    as_json: Json = False,
) -> None:
    """Do it all on handwritten digits, with and without BN.

    It takes about a minute. The digits come with scikit-learn; nothing is fetched. Everything goes to runs/demo.
    """
    from bnlab.cli.render import demo_table
    from bnlab.commands import demo

    result = run_command(demo.run, demo.DemoSettings(seed=seed))
    show_result(
        as_json,
        result.to_json(),
        demo_table(result),
        f"{result.report} shows it. Your own photos: one sub-folder for each class, then\n"
        "  bnlab split PHOTOS --into DATA\n  bnlab train DATA",
    )
