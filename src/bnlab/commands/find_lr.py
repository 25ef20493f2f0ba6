"""`bnlab train --find-lr`: which learning rate a training on DATA could have."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnlab.config import Settings, load_settings
from bnlab.errors import printable
from bnlab.files import write_atomic, write_csv
from bnlab.machine import versions
from bnlab.progress import Progress
from bnlab.report import figures
from bnlab.runs import RUNS, check_free, new_run
from bnlab.training.lr_finder import LrRangeTest, Suggestion, lr_range_test, suggest


@dataclass(frozen=True, kw_only=True)
class FindLrSettings:
    """What `bnlab train --find-lr` is told."""

    data: Path
    """a split folder, a split.csv or a folder of classes"""
    settings: Settings = field(default_factory=load_settings)
    """the recipe"""
    name: str | None = None
    """of the folder in runs; find-lr, find-lr2, ... unless given"""
    strict: bool = False
    """refuse to go on when a photo cannot be used"""
    root: Path = RUNS


@dataclass(frozen=True, kw_only=True)
class FindLrResult:
    """What the sweep came to, and the folder with its figure and table."""

    test: LrRangeTest
    suggestion: Suggestion
    folder: Path
    data: Path

    @property
    def figure(self) -> Path:
        """Loss by learning rate, drawn."""
        return self.folder / "find-lr.png"

    @property
    def table(self) -> Path:
        """The same, one row a step."""
        return self.folder / "find-lr.csv"

    def to_json(self) -> dict[str, Any]:
        """The document of `bnlab train --find-lr --json`."""
        found, test = self.suggestion, self.test
        return {
            "suggested": found.suggested,
            "reason": found.reason,
            "steepest": found.steepest,
            "lowest": found.lowest,
            "tenth_of_minimum": found.tenth_of_minimum,
            "diverged_at": found.diverged_at,
            "lowest_rate": test.curve.rates[0],
            "highest_rate": test.curve.rates[-1],
            "steps": len(test.curve.rates),
            "network": test.recipe.network,
            "size": test.recipe.size,
            "batch_size": test.recipe.batch_size,
            "seed": test.recipe.seed,
            "device": test.device,
            "classes": test.classes,
            "photos": test.photos,
            "data": str(self.data),
            "figure": str(self.figure),
            "table": str(self.table),
            "versions": versions(),
        }


def run(settings: FindLrSettings, progress: Progress) -> FindLrResult:
    """Try learning rates on a network that is thrown away; write find-lr.png and find-lr.csv to a folder of its own.

    Raises:
        BnlabError: DATA, the recipe or the name cannot be used; the disk or memory is full.
        KeyboardInterrupt: Ctrl-C; nothing was written.
    """
    check_free(settings.root, settings.name)
    if "learning_rate" in settings.settings.own:
        progress.warn("learning_rate has no effect: --find-lr tries them from low to high")
    test = lr_range_test(settings.data, settings.settings, strict=settings.strict, progress=progress)
    curve, found = test.curve, suggest(test.curve)
    folder = new_run(settings.root, settings.name, stem="find-lr").folder
    result = FindLrResult(test=test, suggestion=found, folder=folder, data=settings.data)
    rows = zip(range(1, len(curve.rates) + 1), curve.rates, curve.losses, curve.smoothed, strict=True)
    write_csv(
        result.table,
        ("step", "learning_rate", "loss", "smoothed_loss"),
        ((step, f"{rate:.6g}", f"{loss:.6g}", f"{smoothed:.6g}") for step, rate, loss, smoothed in rows),
    )
    marks = {
        "suggested": found.suggested,
        "steepest": found.steepest,
        "lowest": None if found.suggested else found.lowest,
        "a tenth of it": found.tenth_of_minimum,
        "diverged": found.diverged_at,
    }
    title = f"{test.recipe.network}, {test.recipe.size} px, batches of {test.recipe.batch_size}"
    heading = f"{title}, {printable(settings.data.name)}"
    write_atomic(result.figure, figures.lr_range_test_png(curve.rates, curve.losses, curve.smoothed, marks, heading))
    return result
