"""The Python API: what the command line does, as functions. `from bnlab import Classifier, train, split`."""

from os import PathLike
from pathlib import Path
from typing import Any

from bnlab.commands import import_weights as import_command
from bnlab.commands import split as split_command
from bnlab.commands import train as train_command
from bnlab.commands.import_weights import ImportResult, ImportSettings
from bnlab.commands.split import SplitResult, SplitSettings
from bnlab.commands.train import TrainSettings
from bnlab.config import load_settings
from bnlab.data.write_split import LinkMode
from bnlab.progress import NullProgress, Progress
from bnlab.runs import RUNS
from bnlab.training.run import TrainingResult

AnyPath = str | PathLike[str]


def train(
    data: AnyPath,
    *,
    recipe: AnyPath = "default",
    name: str | None = None,
    runs: AnyPath = RUNS,
    strict: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> TrainingResult:
    """Train a classifier on DATA: a split folder, a split.csv or a folder of classes.

    >>> result = train("flowers", epochs=2, size=96)
    >>> result.run.best, result.val_top1
    (PosixPath('runs/train/best.safetensors'), 0.61)

    Args:
        data: where the photos are.
        recipe: the name of a shipped recipe, or a YAML file.
        name: of the run; train, train2, ... unless given.
        runs: the folder runs lie in.
        strict: refuse to go on when a photo cannot be used.
        progress: who is told how far it is; nobody unless given.
        options: any key of a recipe, such as epochs=2 (in epochs) or size=96 (in pixels).

    Returns:
        The run with its files, the accuracy of the best epoch on val (0..1), and its evaluation.

    Raises:
        BnlabError: DATA, the recipe or the name cannot be used, the training diverged, or the disk is full.
        KeyboardInterrupt: Ctrl-C; what a resume needs was saved.
    """
    settings = TrainSettings(
        data=Path(data), settings=load_settings(recipe, options), name=name, strict=strict, root=Path(runs)
    )
    return train_command.run(settings, progress or NullProgress())


def resume(name: str | None = None, *, runs: AnyPath = RUNS, progress: Progress | None = None) -> TrainingResult:
    """Go on with a run, the latest unless named. It ends in the weights it would have had, bit for bit.

    Raises:
        BnlabError: there is no such run, another training has it, or its photos are gone.
    """
    return train_command.run(TrainSettings(resume=True, name=name, root=Path(runs)), progress or NullProgress())


def split(
    photos: AnyPath,
    into: AnyPath,
    *,
    val: float = SplitSettings.val,
    test: float = SplitSettings.test,
    seed: int = SplitSettings.seed,
    how: LinkMode = "link",
    strict: bool = False,
    progress: Progress | None = None,
) -> SplitResult:
    """Split a folder of classes into train, val and test, duplicates kept on one side.

    Args:
        photos: folder with one sub-folder a class; it is never written to.
        into: new folder for train/, val/, test/ and split.csv.
        val: share held out for validation, in 0..1.
        test: share held out for testing, in 0..1.
        seed: another seed, another split.
        how: "link" (hard links, copies where there are none), "copy", or "list" (split.csv alone).
        strict: refuse to go on when a photo cannot be used.
        progress: who is told how far it is; nobody unless given.

    Raises:
        DataError: the photos cannot be split, or `into` holds something else.
        StorageError: no space left; nothing half-made is left behind.
    """
    settings = SplitSettings(
        photos=Path(photos), into=Path(into), val=val, test=test, seed=seed, how=how, strict=strict
    )
    return split_command.run(settings, progress or NullProgress())


def import_weights(
    file: AnyPath,
    output: AnyPath,
    *,
    classes: AnyPath | None = None,
    format: str | None = None,
    network: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> ImportResult:
    """Turn weights from elsewhere into a classifier file; nothing in them is run.

    >>> import_weights("googleNet.pth", "flowers.safetensors", classes="class_indices.json")

    Args:
        file: a state_dict that torch.save wrote, or safetensors: torchvision's googlenet, the GoogLeNet tutorial's,
            BN-Inception with Caffe's names, or of a bnlab network.
        output: the classifier file to write; it must not exist.
        classes: file with their names, JSON or one a line; 0, 1, ... unless given.
        format: "tutorial", "torchvision", "caffe" or "bnlab"; guessed unless given.
        network: which it is; found by the names and shapes of the tensors unless given.
        progress: who is told what is doubtful; nobody unless given.
        options: keys of a recipe: the network's (such as width=0.5), its view's (such as size=224, in pixels).

    Raises:
        UsageError: the output exists, an option cannot be, or the classes' names cannot be used.
        ClassifierError: the file holds no weights, or those of no network that bnlab knows.
        StorageError: no space left or no permission; nothing is left behind.
    """
    settings = ImportSettings(
        file=Path(file),
        output=Path(output),
        classes=None if classes is None else Path(classes),
        format=format,
        options=({} if network is None else {"network": network}) | options,
    )
    return import_command.run(settings, progress or NullProgress())
