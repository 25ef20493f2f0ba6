"""The Python API: what the command line does, as functions. `from bnlab import Classifier, train, split`.

Commands are imported when they are called, because torch takes seconds.
"""

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from bnlab import keywords
from bnlab.options import (
    EvaluateOptions,
    ImportOptions,
    Options,
    PredictOptions,
    SplitOptions,
    StudyOptions,
    TrainOptions,
)
from bnlab.progress import NullProgress, Progress
from bnlab.runs import RUNS
from bnlab.signatures import as_fields, takes

if TYPE_CHECKING:
    from bnlab.classifier.ensemble import AnyClassifier
    from bnlab.commands.evaluate import EvaluateResult
    from bnlab.commands.import_weights import ImportResult
    from bnlab.commands.predict import PredictResult
    from bnlab.commands.split import SplitResult
    from bnlab.commands.study import StudyResult
    from bnlab.commands.train import FindLrResult
    from bnlab.data.photo_input import PhotoInput
    from bnlab.training.session import TrainingResult

AnyPath = str | PathLike[str]


@takes(SplitOptions, keywords.Split)
def split(
    photos: AnyPath, into: AnyPath, *, progress: Progress | None = None, **options: Unpack[keywords.Split]
) -> "SplitResult":
    """Split a folder of classes into train, val and test. Duplicates go to the same split.

    >>> from bnlab import split
    >>> result = split("flowers", into="data", val=0.25)
    >>> result.written, len(result.photos), result.refused
    (True, 36, ())

    Args:

    Returns:
        SplitResult: the photos with their splits, the duplicates, and whether the folder was written or there already.

    Raises:
        UsageError: an argument is unknown or out of range.
        DataError: the photos cannot be split, or `into` holds something else.
        StorageError: the disk is full; nothing unfinished is left behind.
    """
    from bnlab.commands import split as command

    return command.run(
        SplitOptions(photos=Path(photos), into=Path(into), **as_fields(SplitOptions, options)),
        progress or NullProgress(),
    )


@takes(TrainOptions, keywords.Train)
def train(data: AnyPath, *, progress: Progress | None = None, **options: Unpack[keywords.Train]) -> "TrainingResult":
    """Train a classifier, and write it and a report to a new folder in runs/.

    Any key of the recipe is an argument; one that is left out has the value of `recipe`. On a CPU, training is faster
    if the process calls `tune_allocator()` before it imports torch.

    >>> from bnlab import train
    >>> result = train("data", network="bn_small_inception", size=32, batch_size=8, epochs=1)
    >>> print(result.run.best)
    runs/train/best.safetensors
    >>> result.epochs, 0 <= result.val_top1 <= 1, result.warnings
    (1, True, ())
    >>> result.classifier
    <Classifier bn_small_inception, 3 classes, 32 px, on cpu, from runs/train/best.safetensors>

    Args:

    Returns:
        TrainingResult: the run with its files, the best classifier, and its evaluation on val.

    Raises:
        UsageError: an argument is unknown or out of range.
        DataError: the photos cannot be used.
        DivergedError: the loss became NaN or infinite.
        BnlabError: the name is taken, or the disk or the memory is full.
        KeyboardInterrupt: Ctrl-C; the training was saved and can be resumed.
    """
    from bnlab.commands import train as command

    return command.run(TrainOptions(data=Path(data), **as_fields(TrainOptions, options)), progress or NullProgress())


@takes(Options, keywords.Resume)
def resume(
    name: str | None = None,
    *,
    data: AnyPath | None = None,
    runs: AnyPath = RUNS,
    progress: Progress | None = None,
    **options: Unpack[keywords.Resume],
) -> "TrainingResult":
    """Continue a run. It ends in the same weights, bit for bit, as without the interruption.

    With `epochs` or `steps`, the run becomes longer, also after its end, unless its schedule is one-cycle.

    >>> from bnlab import resume
    >>> resume("train").epochs
    1

    Args:
        name: Name of the run (default: the latest).
        data: Where the photos are now, if they were moved.
        runs: Folder in which the folders of runs lie.

    Returns:
        TrainingResult: as of `train`.

    Raises:
        RunError: there is no such run, another training uses it, or its schedule does not go on.
        BnlabError: its photos are gone or have changed, the training diverged, or the disk or the memory is full.
        KeyboardInterrupt: Ctrl-C; the training was saved and can be resumed.
    """
    from bnlab.commands import train as command

    fields = TrainOptions(name=name, data=None if data is None else Path(data), runs=Path(runs), recipe_keys=options)
    return command.resume(fields, progress or NullProgress())


@takes(TrainOptions, keywords.FindLr)
def find_lr(
    data: AnyPath, *, name: str | None = None, progress: Progress | None = None, **options: Unpack[keywords.FindLr]
) -> "FindLrResult":
    """Try learning rates, for 200 steps, and suggest one. No classifier is kept.

    >>> from bnlab import find_lr
    >>> result = find_lr("data", network="bn_mlp", size=32, batch_size=8)
    >>> rate, reason = result.suggestion.suggested, result.suggestion.reason

    Args:
        name: Name of the folder in runs/ for the plot and the table (default: nothing is written).

    Returns:
        FindLrResult: the suggestion, whose rate is None if the losses show none, and the curve.

    Raises:
        UsageError: an argument is unknown or out of range.
        DataError: the photos cannot be used.
        DivergedError: the loss is not finite before any step.
        BnlabError: the name is taken, or the disk or the memory is full.
    """
    from bnlab.commands import train as command

    given = TrainOptions(data=Path(data), name=name, **as_fields(TrainOptions, options))
    return command.find_lr(given, progress or NullProgress(), write=name is not None)


@takes(EvaluateOptions, keywords.Evaluate)
def evaluate(
    classifier: "AnyClassifier",
    data: AnyPath,
    *,
    name: str | None = None,
    progress: Progress | None = None,
    **options: Unpack[keywords.Evaluate],
) -> "EvaluateResult":
    """Measure a classifier, or an ensemble, on photos whose classes are known.

    >>> from bnlab import evaluate
    >>> result = evaluate("runs/train/best.safetensors", "data")
    >>> result.evaluation.split, result.evaluation.n, 0 <= result.evaluation.top1 <= 1
    ('val', 12, True)
    >>> result.evaluation.confusion.shape
    (3, 3)

    Args:
        classifier: Classifier file, run folder, `Classifier` or `Ensemble`; or a list
            of them, which is evaluated as an ensemble.
        name: Name of the folder in runs/ for the page, the tables and the figures (default: nothing is written).

    Returns:
        EvaluateResult: the evaluation with its metrics, and how many of the photos the classifier was trained on.

    Raises:
        UsageError: an argument is unknown or out of range.
        ClassifierError: a file cannot be read, or the photos have a class that the classifier does not know.
        DataError: not one photo can be used.
        BnlabError: the name is taken, the outputs are not finite, or the disk or the memory is full.
    """
    from bnlab.classifier.ensemble import open_classifiers
    from bnlab.commands import evaluate as command
    from bnlab.errors import UsageError

    if "classifiers" in options:
        raise UsageError("evaluate has no argument classifiers", "pass the list as classifier, the first argument")
    ensemble = open_classifiers(classifier, options.get("device", "auto"))
    files = [Path(member) for member in ensemble.names]
    given = EvaluateOptions(classifiers=files, data=Path(data), name=name, **as_fields(EvaluateOptions, options))
    return command.run(given, progress or NullProgress(), ensemble=ensemble, write=name is not None)


@takes(PredictOptions, keywords.Predict)
def predict(
    classifier: "AnyClassifier",
    photos: "PhotoInput | Iterable[PhotoInput]",
    *,
    progress: Progress | None = None,
    **options: Unpack[keywords.Predict],
) -> "PredictResult":
    """Classify photos. Nothing is written, unless `csv` or `show` asks for it.

    >>> from bnlab import predict
    >>> for prediction in predict("runs/train/best.safetensors", ["tulip.jpg", "data/val"], top=2):
    ...     path, label, probability = prediction.path, prediction.label, prediction.probability

    Args:
        classifier: Classifier file, run folder, `Classifier` or `Ensemble`; or a list
            of them, whose probabilities are averaged.
        photos: One photo, or an iterable of photos: paths, folders, and all that `Classifier.predict` takes.

    Returns:
        PredictResult: a sequence of predictions, in the order of the photos. For a photo that cannot be used, a
            prediction has the reason.

    Raises:
        UsageError: an argument is unknown or out of range.
        ClassifierError: a file cannot be read, or gives probabilities that are not finite.
        DataError: there is no such photo, a folder has none, or not one can be used.
        StorageError: the disk is full or cannot be written to.
    """
    from bnlab.classifier.ensemble import open_classifiers
    from bnlab.commands import predict as command
    from bnlab.data.photo_input import several

    ensemble = open_classifiers(classifier, options.get("device", "auto"))
    given = PredictOptions(classifier=Path(ensemble.names[0]), photos=[], **as_fields(PredictOptions, options))
    return command.run(given, progress or NullProgress(), ensemble=ensemble, photos=several(photos))


@takes(ImportOptions, keywords.ImportWeights)
def import_weights(
    file: AnyPath, output: AnyPath, *, progress: Progress | None = None, **options: Unpack[keywords.ImportWeights]
) -> "ImportResult":
    """Turn weights from elsewhere into a classifier file. Code in them is never run.

    >>> import torch
    >>> from bnlab import import_weights, nets
    >>> torch.save(nets.build("bn_mlp", classes=3).state_dict(), "weights.pth")
    >>> result = import_weights("weights.pth", "mlp.safetensors", format="bnlab")
    >>> result.card.network, result.card.classes
    ('bn_mlp', ('0', '1', '2'))

    Args:

    Returns:
        ImportResult: the card of the file, and what was done to the tensors.

    Raises:
        UsageError: the output exists, an argument is not valid, or the class names cannot be used.
        ClassifierError: the file holds no weights, or weights of a network that bnlab does not know.
        StorageError: the disk is full or cannot be written to; nothing unfinished is left behind.
    """
    from bnlab.commands import import_weights as command

    return command.run(
        ImportOptions(file=Path(file), output=Path(output), **as_fields(ImportOptions, options)),
        progress or NullProgress(),
    )


@takes(StudyOptions, keywords.Study)
def study(study: str, *, progress: Progress | None = None, **options: Unpack[keywords.Study]) -> "StudyResult":
    """Measure whether a claim about batch normalisation holds here, and write a page to runs/.

    >>> from bnlab import study
    >>> result = study("whitening", seeds=2, steps=1, batch_size=8, width=0.25)
    >>> print(result.reports[0].conclusion.verdict)
    not shown

    Args:
        study: Name of a study, or "all" (docs/studies.md lists them).

    Returns:
        StudyResult: for each study its verdict, evidence and tables.

    Raises:
        UsageError: there is no such study, an argument is unknown or out of range, or the study sets it itself.
        DataError: the photos cannot be used.
        BnlabError: the name is taken, or the disk or the memory is full.
        KeyboardInterrupt: Ctrl-C; the measurements made so far are kept.
    """
    from bnlab.commands import study as command

    return command.run(StudyOptions(study=study, **as_fields(StudyOptions, options)), progress or NullProgress())
