"""The Python API: what the command line does, as functions. `from bnlab import Classifier, train, split`.

Their options are defined once, in options.py, from which their signatures and the lists of their arguments are made.
"""

import inspect
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from textwrap import TextWrapper
from typing import Any, TypeVar

from bnlab.commands import import_weights as import_command
from bnlab.commands import split as split_command
from bnlab.commands import train as train_command
from bnlab.commands.import_weights import ImportResult
from bnlab.commands.split import SplitResult
from bnlab.config import meaning
from bnlab.options import ImportOptions, Options, SplitOptions, TrainOptions
from bnlab.progress import NullProgress, Progress
from bnlab.runs import RUNS
from bnlab.training.run import TrainingResult

AnyPath = str | PathLike[str]
F = TypeVar("F", bound=Callable[..., object])


def _takes(options: type[Options]) -> Callable[[F], F]:
    """Give a function the fields of `options` as keyword arguments, in its signature and in its docstring."""

    def decorate(function: F) -> F:
        own = inspect.signature(function).parameters
        listed = [parameter for name, parameter in own.items() if name not in ("progress", "options")]
        for name, field in options.fields().items():
            if name not in own and name != "recipe_keys":
                keyword = inspect.Parameter.KEYWORD_ONLY
                listed.append(inspect.Parameter(name, keyword, default=field.default, annotation=field.annotation))
        rest = [own["options"]] if "recipe_keys" in options.model_fields else []
        function.__signature__ = inspect.Signature([*listed, own["progress"], *rest])  # type: ignore[attr-defined]
        filled = TextWrapper(110, initial_indent=" " * 4, subsequent_indent=" " * 8).fill
        lines = [filled(f"{parameter.name}: {meaning(options, parameter.name)}") for parameter in listed]
        function.__doc__ = (inspect.getdoc(function) or "").replace("Args:", "\n".join(["Args:", *lines]))
        return function

    return decorate


def _split_keys(options: type[Options], given: dict[str, Any]) -> dict[str, Any]:
    """The given arguments as fields of `options`; those that it does not have are keys of the recipe."""
    fields = {name: given.pop(name) for name in options.model_fields if name in given and name != "recipe_keys"}
    return fields | {"recipe_keys": given}


@_takes(TrainOptions)
def train(data: AnyPath, *, progress: Progress | None = None, **options: Any) -> TrainingResult:
    """Train a classifier.

    >>> result = train("flowers", epochs=2, size=96)
    >>> result.run.best, result.val_top1
    (PosixPath('runs/train/best.safetensors'), 0.61)

    Args:
        progress: Object that receives progress and warnings (default: none).
        options: Any key of the recipe (docs/recipes.md lists them), such as epochs=2 or size=96.

    Returns:
        The run with its files, the accuracy of the best epoch on val (0 to 1), and its evaluation.

    Raises:
        BnlabError: an argument or the photos cannot be used, the training diverged, or the disk or memory is full.
        KeyboardInterrupt: Ctrl-C; the training was saved and can be resumed.
    """
    return train_command.run(
        TrainOptions(data=Path(data), **_split_keys(TrainOptions, options)), progress or NullProgress()
    )


def resume(
    name: str | None = None,
    *,
    data: AnyPath | None = None,
    runs: AnyPath = RUNS,
    progress: Progress | None = None,
    **options: Any,
) -> TrainingResult:
    """Continue a run. It ends in the same weights, bit for bit, as without the interruption.

    >>> resume("flowers", epochs=30)  # trains longer, also after the end, unless the schedule is one-cycle

    Args:
        name: Name of the run (default: the latest).
        data: Where the photos are now, if they were moved.
        runs: Folder in which the folders of runs lie.
        progress: Object that receives progress and warnings (default: none).
        options: epochs or steps, the new total; and keys of the recipe that change no result, such as workers.

    Raises:
        BnlabError: there is no such run, another training uses it, its photos are gone or have changed, or its schedule
            does not go on.
        KeyboardInterrupt: Ctrl-C; the training was saved and can be resumed.
    """
    given = TrainOptions(name=name, data=None if data is None else Path(data), runs=Path(runs), recipe_keys=options)
    return train_command.resume(given, progress or NullProgress())


@_takes(SplitOptions)
def split(photos: AnyPath, into: AnyPath, *, progress: Progress | None = None, **options: Any) -> SplitResult:
    """Split a folder of classes into train, val and test. Duplicates go to the same split.

    Args:
        progress: Object that receives progress and warnings (default: none).

    Raises:
        UsageError: an argument is unknown or out of range.
        DataError: the photos cannot be split, or `into` holds something else.
        StorageError: the disk is full; nothing unfinished is left behind.
    """
    return split_command.run(SplitOptions(photos=Path(photos), into=Path(into), **options), progress or NullProgress())


@_takes(ImportOptions)
def import_weights(file: AnyPath, output: AnyPath, *, progress: Progress | None = None, **options: Any) -> ImportResult:
    """Turn weights from elsewhere into a classifier file. Code in them is never run.

    >>> import_weights("googleNet.pth", "flowers.safetensors", classes="class_indices.json")

    Args:
        progress: Object that receives progress and warnings (default: none).
        options: Keys of the recipe that shape the network, such as width=0.5, or its preprocessing, such as size=224.

    Raises:
        UsageError: the output exists, an argument is not valid, or the class names cannot be used.
        ClassifierError: the file holds no weights, or weights of a network that bnlab does not know.
        StorageError: the disk is full or cannot be written to; nothing unfinished is left behind.
    """
    fields = _split_keys(ImportOptions, options)
    return import_command.run(ImportOptions(file=Path(file), output=Path(output), **fields), progress or NullProgress())
