"""What a resume needs: state.pt, from which a killed training ends in the same weights, bit for bit."""

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from bnlab.errors import RunError, printable, quoted
from bnlab.files import file_sha256, write_atomic
from bnlab.recipe import MACHINE_KEYS, Recipe
from bnlab.runs import Run
from bnlab.training.schedule import Plan, StepTimes

Row = dict[str, float | int | None]
FORMAT_VERSION = 2


class Stateful(Protocol):
    """What can be kept, and put back where it stood: a network, an optimiser."""

    def state_dict(self) -> dict[str, Any]:
        """All that has to be kept, as torch.save takes it."""

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        """Stand where it stood."""


@dataclass(kw_only=True)
class TrainState:
    """Where a training stands. All randomness follows from the seed and these numbers: no generator is saved."""

    epoch: int = 0
    """the running epoch, from 0"""
    batch: int = 0
    """batches of it that are done"""
    step: int = 0
    """optimiser steps so far"""
    size: int = 0
    """side of the photos of the running epoch, once it has begun"""
    loss: float = 0.0
    """sum over the photos of the running epoch"""
    right: int = 0
    """photos of the running epoch whose main output was right"""
    seen: int = 0
    """photos of the running epoch"""
    seconds: float = 0.0
    """spent on training steps of the running epoch"""
    plan: Plan = field(default_factory=lambda: Plan(steps=0, batches=1))
    """how many steps there are, once the training has begun"""
    step_times: StepTimes = field(default_factory=lambda: StepTimes(steps={}, validation=0.0, last=0.0))
    """what a plan for a time was made by"""
    training_seconds: float = 0.0
    """spent on training steps of all epochs"""
    planned_seconds: float = 0.0
    """that these steps were planned to take"""
    total_seconds: float = 0.0
    """spent on all that was done so far, validation included"""
    rows: list[Row] = field(default_factory=list)
    """metrics of the finished epochs"""
    best: Row | None = None
    """the row of the best epoch"""

    def begin_epoch(self) -> None:
        """Go on to the next epoch."""
        self.epoch += 1
        self.batch = self.right = self.seen = 0
        self.loss = self.seconds = 0.0


def save_state(run: Run, position: TrainState, recipe: Recipe, parts: Mapping[str, Stateful]) -> None:
    """Write the run's state.pt atomically.

    Raises:
        StorageError: no space left; the older state is untouched.
    """
    content = io.BytesIO()
    state = {
        "format": FORMAT_VERSION,
        "recipe": _results_of(recipe),
        "split": file_sha256(run.split),
        "position": asdict(position),
        **{name: part.state_dict() for name, part in parts.items()},
    }
    torch.save(state, content)
    write_atomic(run.state, content.getbuffer())


def load_state(run: Run, recipe: Recipe, parts: Mapping[str, Stateful]) -> TrainState:
    """Put all parts where they stood; from the beginning when nothing was saved yet.

    Raises:
        RunError: the state is lost, broken, of a newer format, or of another recipe or list of photos.
    """
    path = run.state
    if not path.exists():
        if run.last.exists():
            raise RunError(
                f"run {printable(run.folder)} has lost its state.pt, which a resume needs",
                f"begin a new run with --init {quoted(run.last)}",
            )
        return TrainState()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != FORMAT_VERSION:
            age = "a newer" if state["format"] > FORMAT_VERSION else "an older"
            raise RunError(f"{printable(path)} was written by {age} bnlab", "resume with that one, or begin a new run")
        before, now = _results_of(Recipe.model_validate(state["recipe"])), _results_of(recipe)  # younger keys: defaults
        if before != now:
            changed = sorted(key for key, value in now.items() if before[key] != value)
            raise RunError(
                f"the recipe of {printable(path.parent)} was changed after it began ({', '.join(changed)})",
                "change it back, or begin a new run with --init",
            )
        if state["split"] != file_sha256(run.split):
            raise RunError(
                f"{printable(run.split)} was changed after the run began", "change it back, or begin a new run"
            )
        for name, part in parts.items():
            part.load_state_dict(state[name])
        kept = state["position"]
        return TrainState(**kept | {"plan": Plan(**kept["plan"]), "pace": StepTimes(**kept["pace"])})
    except RunError:
        raise
    except Exception as error:  # whatever torch makes of a broken file
        reason = " ".join(str(error).split())[:120]
        raise RunError(f"{printable(path)} cannot be read ({reason})", "begin a new run") from None


def _results_of(recipe: Recipe) -> Mapping[str, Any]:
    """The settings that decide the results."""
    return recipe.model_dump(mode="json", exclude=set(MACHINE_KEYS))
