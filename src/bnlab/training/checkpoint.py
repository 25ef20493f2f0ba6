"""Saves and loads state.pt, from which an interrupted training resumes and ends in the same weights, bit for bit."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bnlab.errors import BnlabError, OutOfMemoryError, RunError, printable
from bnlab.files import file_sha256, write_atomic
from bnlab.machine import is_out_of_memory
from bnlab.recipe import LENGTH_KEYS, MACHINE_KEYS, Recipe
from bnlab.runs import Run
from bnlab.training.build import Stateful
from bnlab.training.extend import extend, new_run_from
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


def load_state(run: Run, recipe: Recipe, parts: Mapping[str, Stateful], *, longer: bool = False) -> TrainState:
    """Restore all parts and give the state of the training; a new state if nothing was saved yet.

    The recipe may have other `epochs` or `steps` than before: the training is then longer. `longer` says that this is
    what the user asked for.

    Raises:
        RunError: state.pt is lost, broken, of another format, or of another recipe or split; or the training cannot be
            made longer.
        OutOfMemoryError: the memory is full.
    """
    path = run.state
    if not path.exists():
        if run.last.exists():
            raise RunError(
                f"run {printable(run.folder)} has lost its state.pt, which a resume needs",
                new_run_from(run),
            )
        return TrainState()
    document = read_state(run)
    with _reading(path):
        recipe_before = Recipe.model_validate(document["recipe"])  # so that keys added since have their defaults
        before, now = _settings_of_results(recipe_before), _settings_of_results(recipe)
        changed = sorted(key for key, value in now.items() if before[key] != value)
        if set(changed) - LENGTH_KEYS:
            raise RunError(
                f"the recipe of {printable(path.parent)} was changed after it began ({', '.join(changed)})",
                "change it back, or begin a new run with init",
            )
        if document["split"] != file_sha256(run.split):
            raise RunError(
                f"{printable(run.split)} was changed after the run began", "change it back, or begin a new run"
            )
        for name, part in parts.items():
            part.load_state_dict(document[name])
        kept = document["state"]
        nested = {"plan": Plan(**kept["plan"]), "step_times": StepTimes(**kept["step_times"])}
        state = TrainState(**kept | nested)
        if longer or changed:
            extend(run, state, recipe_before, recipe)
        return state


def read_state(run: Run) -> dict[str, Any]:
    """The document in state.pt.

    Raises:
        RunError: it is broken, or another version of bnlab wrote it.
        OutOfMemoryError: the memory is full.
    """
    with _reading(run.state):
        document: dict[str, Any] = torch.load(run.state, map_location="cpu", weights_only=True)
        version = document["format"]
    if version != FORMAT_VERSION:
        raise RunError(
            f"{printable(run.state)} has format {version}, and this bnlab reads format {FORMAT_VERSION}",
            "resume with the bnlab that wrote it, or begin a new run",
        )
    return document


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn errors of reading a checkpoint into one that names it; only a broken file calls for a new run."""
    try:
        yield
    except BnlabError:
        raise
    except Exception as error:  # torch raises errors of many types for a broken file
        if is_out_of_memory(error):
            what = f"out of memory while {printable(path)} was read"
            raise OutOfMemoryError(what, "close what else takes memory, and resume again") from None
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        is_system = isinstance(error, OSError)
        remedy = "make the file readable, and resume again" if is_system else "begin a new run"
        raise RunError(f"{printable(path)} cannot be read ({reason})", remedy) from None


def _settings_of_results(recipe: Recipe) -> Mapping[str, Any]:
    return recipe.model_dump(mode="json", exclude=set(MACHINE_KEYS))
