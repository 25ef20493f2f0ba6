"""Saves and loads state.pt, from which an interrupted training resumes and ends in the same weights, bit for bit."""

import io
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bnlab.errors import RunError, printable, quoted
from bnlab.files import file_sha256, write_atomic
from bnlab.recipe import MACHINE_KEYS, Recipe
from bnlab.runs import Run
from bnlab.training.build import Stateful
from bnlab.training.schedule import Plan, StepTimes
from bnlab.training.state import TrainState

FORMAT_VERSION = 4


def save_state(run: Run, state: TrainState, recipe: Recipe, parts: Mapping[str, Stateful]) -> None:
    """Write the run's state.pt atomically.

    Raises:
        StorageError: no space left; the older state.pt is untouched.
    """
    content = io.BytesIO()
    document = {
        "format": FORMAT_VERSION,
        "recipe": _settings_of_results(recipe),
        "split": file_sha256(run.split),
        "state": asdict(state),
        **{name: part.state_dict() for name, part in parts.items()},
    }
    torch.save(document, content)
    write_atomic(run.state, content.getbuffer())


def load_state(run: Run, recipe: Recipe, parts: Mapping[str, Stateful]) -> TrainState:
    """Restore all parts and give the state of the training; a new state if nothing was saved yet.

    Raises:
        RunError: state.pt is lost, broken, of another format, or of another recipe or split.
    """
    path = run.state
    if not path.exists():
        if run.last.exists():
            raise RunError(
                f"run {printable(run.folder)} has lost its state.pt, which a resume needs",
                f"begin a new run with --init {quoted(run.last)}",
            )
        return TrainState()
    document = read_state(run)
    try:
        # Through Recipe, so that keys added since have their defaults.
        before, now = _settings_of_results(Recipe.model_validate(document["recipe"])), _settings_of_results(recipe)
        if before != now:
            changed = sorted(key for key, value in now.items() if before[key] != value)
            raise RunError(
                f"the recipe of {printable(path.parent)} was changed after it began ({', '.join(changed)})",
                "change it back, or begin a new run with --init",
            )
        if document["split"] != file_sha256(run.split):
            raise RunError(
                f"{printable(run.split)} was changed after the run began", "change it back, or begin a new run"
            )
        for name, part in parts.items():
            part.load_state_dict(document[name])
        kept = document["state"]
        nested = {"plan": Plan(**kept["plan"]), "step_times": StepTimes(**kept["step_times"])}
        return TrainState(**kept | nested)
    except RunError:
        raise
    except Exception as error:
        raise _broken(path, error) from None


def read_state(run: Run) -> dict[str, Any]:
    """The document in state.pt.

    Raises:
        RunError: it is broken, or another version of bnlab wrote it.
    """
    try:
        document: dict[str, Any] = torch.load(run.state, map_location="cpu", weights_only=True)
        version = document["format"]
    except Exception as error:  # torch raises errors of many types for a broken file
        raise _broken(run.state, error) from None
    if version != FORMAT_VERSION:
        raise RunError(
            f"{printable(run.state)} has format {version}, and this bnlab reads format {FORMAT_VERSION}",
            "resume with the bnlab that wrote it, or begin a new run",
        )
    return document


def _broken(path: Path, error: Exception) -> RunError:
    reason = " ".join(str(error).split())[:120]
    return RunError(f"{printable(path)} cannot be read ({reason})", "begin a new run")


def _settings_of_results(recipe: Recipe) -> Mapping[str, Any]:
    return recipe.model_dump(mode="json", exclude=set(MACHINE_KEYS))
