"""The options of every verb: one definition gives validation, command line, Python signature and documentation.

The text below a field is its help on the command line, in docs/commands.md and in `help(bnlab.split)`. A field is the
option `--name` unless its annotation has a typer.Argument or typer.Option that says otherwise. A training's own
settings are in recipe.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from bnlab.config import explain, parse_assignments
from bnlab.errors import UsageError
from bnlab.recipe import MAX_MEGAPIXELS, Device, Fraction, PixelRange, path_text
from bnlab.runs import RUNS

API_ONLY = "a field that the command line does not offer, or takes in another way"

ClassifierFile = Annotated[Path, typer.Argument(metavar="CLASSIFIER")]
RecipeKeys = Annotated[
    Mapping[str, Any],
    BeforeValidator(lambda given: given if isinstance(given, Mapping) else parse_assignments(given or ())),
    typer.Option("--set", metavar="KEY=VALUE"),
]


class Options(BaseModel):
    """Base of the options of a verb.

    Raises:
        UsageError: an option is unknown or out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, defer_build=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UsageError(*explain(error, type(self), what="the call", where={})) from None

    @classmethod
    def fields(cls) -> dict[str, FieldInfo]:
        """The fields by name in the order of help: those of this verb, then those that verbs share."""
        return dict(sorted(cls.model_fields.items(), key=lambda item: item[0] not in cls.__annotations__))


class _Device(Options):
    device: Device = "auto"
    """Device to run on (default: the first of cuda, mps and cpu that is there)."""


class _Strict(Options):
    strict: bool = False
    """Stop with an error if a photo cannot be used, instead of leaving it out."""


class _Photos(_Strict):
    max_megapixels: Annotated[float, Field(ge=0)] = MAX_MEGAPIXELS
    """Largest photo that is read, in millions of pixels, because a small file may claim a huge picture (0: any)."""


class _Runs(Options):
    runs: Annotated[Path, API_ONLY] = RUNS
    """Folder in which the folders of runs lie."""


class _Inference(_Device, _Photos, _Runs):
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Number of images that go through the network at a time."""


class SplitOptions(_Photos):
    photos: Annotated[Path, typer.Argument(metavar="PHOTOS")]
    """Folder with one sub-folder of photos for each class. It is never written to."""
    into: Annotated[Path, typer.Option(metavar="DATA")]
    """New folder for train/, val/, test/ and split.csv."""
    val: Fraction = 0.1
    """Fraction of the photos that goes to val, for validation."""
    test: Fraction = 0.0
    """Fraction of the photos that goes to test, for a last measurement."""
    seed: int = 0
    """Seed of the split. Another seed gives another split."""
    pixel_range: Annotated[PixelRange | None, typer.Option(metavar="LOW,HIGH")] = None
    """Values that are black and white in pictures of more than 8 bits a channel or of floating-point numbers, such as
    0,4095; 4095 means the same (default: as the file says). Train with the same pixel_range."""
    how: Annotated[Literal["link", "copy", "list"], API_ONLY] = "link"
    """What is written: "link" (hard links, or copies where the disk has no hard links), "copy", or "list" (split.csv
    only)."""


class TrainOptions(_Strict, _Runs):
    data: Annotated[Path | None, typer.Argument(metavar="DATA")] = None
    """Photos to train on: a split folder, a split.csv, or a folder of classes; with --resume, only needed if they were
    moved."""
    recipe: Annotated[str, BeforeValidator(path_text)] = "default"
    """Settings of the training: a YAML file, or one of the names default, classic, digits, and the paper's inception,
    bn-baseline, bn-x5, bn-x30 and bn-x5-sigmoid."""
    recipe_keys: RecipeKeys = {}
    """Any key of the recipe (docs/recipes.md lists them), such as momentum=0.8. May be repeated."""
    name: str | None = None
    """Name of the run folder (default: train, train2, ...)."""


class EvaluateOptions(_Inference):
    classifiers: Annotated[list[Path], Field(min_length=1), API_ONLY]
    """Classifier file or run folder; or several, evaluated as an ensemble: their probabilities are averaged."""
    data: Annotated[Path, API_ONLY]
    """Photos to evaluate on: a split folder, a split.csv, or a folder of classes."""
    split: Literal["train", "val", "test", "all"] | None = None
    """Split to evaluate on (default: the first of test, val, train and all that DATA has)."""
    crops: Literal[1, 10, 144] = 1
    """Number of crops of each photo, flipped ones included, whose probabilities are averaged: 10 as in Krizhevsky et
    al. 2012, or 144 as in GoogLeNet and in figure 4 of the BN paper. Time grows in proportion."""
    name: str | None = None
    """Name of the folder in runs/ (default: evaluate, evaluate2, ...)."""
    workers: Annotated[int, Field(ge=-1, le=256)] = -1
    """Number of threads that read photos (0: none, -1: as many as suit this machine)."""


class ModelOptions(Options):
    """Which network, and what it takes."""

    model: Annotated[str, typer.Argument(metavar="MODEL")]
    """Classifier file or run folder; or PATH.py:NAME or package.module:NAME, a function without arguments that makes
    the network: that code is run."""
    weights: Annotated[Path | None, typer.Option(metavar="FILE")] = None
    """Weights of the network that NAME makes: safetensors, or a state_dict that torch.save wrote. Code in it is never
    run."""
    prefix: str | None = None
    """What the names of the weights in that file begin with, where it has several sets of them, such as model_ema
    (default: the one with which they fit)."""
    classes: Annotated[Path | None, typer.Option(metavar="CLASSES")] = None
    """File of the class names in the order of the network's outputs (default: the names of the folders, sorted)."""
    size: Annotated[int | None, Field(ge=1, le=8192)] = None
    """Height and width of the image that the network takes, in pixels (default: 224; a classifier file says it)."""
    resize: Literal["squash", "crop"] | None = None
    """How photos become squares: squash scales both sides, crop takes the centre (default: crop)."""
    mean: Annotated[str | None, typer.Option(metavar="R,G,B")] = None
    """Subtracted from each colour, in 0..1 (default: ImageNet's, 0.485,0.456,0.406)."""
    std: Annotated[str | None, typer.Option(metavar="R,G,B")] = None
    """Divides each colour after that (default: ImageNet's, 0.229,0.224,0.225)."""


class DoctorOptions(_Inference, ModelOptions):
    data: Annotated[Path, typer.Option(metavar="FOLDER")]
    """Photos whose classes are known: a split folder, a split.csv, or a folder of classes."""
    reference: Annotated[Path | None, typer.Option(metavar="FOLDER")] = None
    """Training photos, to tell stale statistics from photos that are not like those of the training (default: the train
    split of --data, if it has one)."""
    split: Literal["train", "val", "test", "all"] | None = None
    """Split to diagnose on (default: the first of test, val, train and all that --data has)."""
    images: Annotated[int, Field(ge=2)] = 1024
    """Number of photos, at most."""
    select: list[str] | None = None
    """Id or name of a check to make, such as BN102 (default: all). May be repeated."""
    ignore: list[str] | None = None
    """Id or name of a check not to make. May be repeated."""
    fail_on: Literal["error", "warn", "info"] = "warn"
    """The exit status is 1 if there is a finding of this severity or a worse one."""
    baseline: Annotated[Path | None, typer.Option(metavar="FILE")] = None
    """File diagnosis.json of an earlier diagnosis: what it found is known, and is not reported again."""
    fix: Annotated[Path | None, typer.Option(metavar="FILE")] = None
    """New file to write the repaired weights to: those repairs are made that cannot change what was trained and that
    help. The photos are then also those that statistics are measured on, unless there is a reference."""
    name: str | None = None
    """Name of the folder in runs/ (default: doctor, doctor2, ...)."""
    workers: Annotated[int, Field(ge=-1, le=256)] = -1
    """Number of threads that read photos (0: none, -1: as many as suit this machine)."""


class RecalibrateOptions(_Inference, ModelOptions):
    data: Annotated[Path, typer.Option(metavar="FOLDER")]
    """Training photos: a split folder, a split.csv, or a folder of classes. Where it has splits, statistics are
    measured on train, and accuracy on test or val."""
    output: Annotated[Path, typer.Option(metavar="FILE")]
    """New file: a classifier file if MODEL is one, and else a state_dict whose name ends in .safetensors, .pt or
    .pth."""
    images: Annotated[int, Field(ge=2)] = 1024
    """Number of photos to measure on, and of those to score, at most."""
    layer_by_layer: bool = False
    """Measure each layer once those before it have their new statistics: exact, with one pass for each layer."""
    workers: Annotated[int, Field(ge=-1, le=256)] = -1
    """Number of threads that read photos (0: none, -1: as many as suit this machine)."""


class FreezeOptions(_Inference):
    classifier: ClassifierFile
    """Classifier file, or the folder of a run, whose best.safetensors is read."""
    output: Annotated[Path, typer.Option(metavar="FILE")]
    """New classifier file; its name has to end in .safetensors."""
    data: Annotated[Path | None, typer.Option(metavar="FOLDER")] = None
    """Photos to measure accuracy on, before and after (default: none)."""
    images: Annotated[int, Field(ge=2)] = 1024
    """Number of photos to measure on, at most."""
    workers: Annotated[int, Field(ge=-1, le=256)] = -1
    """Number of threads that read photos (0: none, -1: as many as suit this machine)."""


class PredictOptions(_Inference):
    classifier: ClassifierFile
    """Classifier file, or the folder of a run, whose best.safetensors is read."""
    photos: Annotated[list[Path], typer.Argument(metavar="PHOTO...")]
    """Photos, and folders of photos."""
    top: Annotated[int, Field(ge=1)] = 5
    """Number of classes to give for each photo, the most probable first."""
    csv: Annotated[Path | None, typer.Option(metavar="FILE")] = None
    """New CSV file to write the predictions to as well (default: none)."""
    show: bool = False
    """Make a picture of the photos with their predictions, and open it."""


class DemoOptions(_Runs):
    seed: int = 0
    """Seed from which all randomness follows."""


class MachineOptions(_Device):
    pass


class NetOptions(Options):
    name: Annotated[str | None, typer.Argument(metavar="NAME")] = None
    """Name of the network. Without it, all networks are listed."""
    size: int = 224
    """Height and width of the image that the network takes, in pixels."""
    classes: int = 1000
    """Number of classes."""
    auxiliary: bool = False
    """Include GoogLeNet's two auxiliary classifiers."""
    recipe_keys: RecipeKeys = {}
    """A key of the recipe that shapes the network, such as width=0.5; or in_channels. May be repeated."""


class ImportOptions(Options):
    file: Annotated[Path, typer.Argument(metavar="FILE")]
    """Weights: a state_dict that torch.save wrote, or a safetensors file."""
    output: Annotated[Path, typer.Option(metavar="OUT")]
    """New classifier file; its name has to end in .safetensors."""
    classes: Annotated[Path | None, typer.Option(metavar="CLASSES")] = None
    """File of the class names in the order of the network's outputs: JSON ({"0": NAME, ...} or a list), or one name a
    line (default: the names are 0, 1, ...)."""
    format: str | None = None
    """What wrote the file: tutorial, torchvision, caffe or bnlab (default: found from the names of the tensors)."""
    network: str | None = None
    """Name of the network (default: found from the names and shapes of the tensors)."""
    prefix: str | None = None
    """What the names of the network's tensors begin with, where FILE holds several networks, such as model. and
    ema_model. (default: found from the name of the last layer)."""
    recipe_keys: RecipeKeys = {}
    """A key of the recipe that shapes the network or its preprocessing, such as size=224. May be repeated."""


class StudyOptions(_Device, _Runs):
    study: Annotated[str, typer.Argument(metavar="STUDY")]
    """Name of a study; "list" lists them, "all" measures each."""
    data: Annotated[Path | None, typer.Option(metavar="DATA")] = None
    """Images to measure on: MNIST's IDX files, a split folder, a split.csv or a folder of classes (default:
    scikit-learn's handwritten digits)."""
    seeds: Annotated[int, Field(ge=1, le=100)] = 3
    """Number of seeds. The verdict follows from the interval over them, so fewer than 3 show little."""
    budget: Literal["quick", "full"] = "quick"
    """What a study may cost: quick takes about 3 minutes a study on two cores, full has the scale of the paper."""
    recipe_keys: RecipeKeys = {}
    """A key of the recipe for every training, such as size, width, steps or epochs (docs/studies.md lists those that
    a study takes). May be repeated."""
    processes: Annotated[int, Field(ge=-1)] = -1
    """Number of trainings at a time on a CPU, each on one core (-1: one for each core, 0: in this process)."""
    name: str | None = None
    """Name of the folder in runs/ (default: study-STUDY, study-STUDY2, ...)."""
