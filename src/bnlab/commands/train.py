"""`bnlab train`: a classifier from DATA."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnlab.config import Settings, load_settings
from bnlab.errors import UsageError
from bnlab.progress import Progress
from bnlab.report.page import write_run_page
from bnlab.runs import RUNS
from bnlab.training import run as training_run
from bnlab.training.run import TrainingResult


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What `bnlab train` is told."""

    data: Path | None = None
    """a split folder, a split.csv or a folder of classes; nothing with `resume`"""
    settings: Settings = field(default_factory=load_settings)
    """the recipe"""
    name: str | None = None
    """of the run; train, train2, ... unless given"""
    resume: bool = False
    """go on with the run of that name, or the latest"""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """recipe keys a resume may change: none that changes a result"""
    strict: bool = False
    """refuse to go on when a photo cannot be used"""
    root: Path = RUNS
    """where runs lie"""


def run(settings: TrainSettings, progress: Progress) -> TrainingResult:
    """Train, or go on with a training, and write its report.

    Raises:
        BnlabError: what was asked for cannot be done; the message says why and what to do.
        Interrupted: Ctrl-C; what a resume needs was saved.
    """
    if settings.resume:
        result = training_run.resume(settings.name, root=settings.root, changes=settings.changes, progress=progress)
    elif settings.data is None:
        raise UsageError("there is no DATA to train on", "give a folder of classes, or --resume to go on with a run")
    else:
        result = training_run.train(
            settings.data,
            settings.settings,
            root=settings.root,
            name=settings.name,
            strict=settings.strict,
            progress=progress,
        )
    write_run_page(result.run, result.evaluation, result.rows, str(result.frozen))
    return result
