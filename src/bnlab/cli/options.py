"""Arguments and options that several verbs of the command line share, each with its help."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Strict = Annotated[bool, typer.Option("--strict", help="Make a photo that cannot be used an error.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Workers = Annotated[int, typer.Option(help="Threads that read photos; -1: as many as suit this machine.")]
BatchSize = Annotated[int, typer.Option(help="Photos at a time.", min=1)]
ClassifierFile = Annotated[
    Path, typer.Argument(metavar="CLASSIFIER", help="A classifier file: best.safetensors of a run.")
]


class Crops(StrEnum):
    """Crops of a photo that evaluation averages over."""

    one = "1"
    ten = "10"
    many = "144"


class SplitName(StrEnum):
    """The sides of a split that can be evaluated."""

    train = "train"
    val = "val"
    test = "test"
    all = "all"
