"""Trains a new run or resumes one."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bnlab.classifier.seen import NO_HISTORY
from bnlab.config import YOURS, Settings, read_recipe_file, to_yaml, with_changes, with_lines_of
from bnlab.data.dataset import open_recorded_data
from bnlab.data.location import DATA_JSON
from bnlab.data.split_csv import write_split_csv
from bnlab.data.verify import check_unchanged
from bnlab.errors import UsageError, plural, printable
from bnlab.files import (
    read_json,
    remove_drafts,
    write_atomic,
    write_json,
)
from bnlab.machine import choose_device, environment
from bnlab.progress import Progress
from bnlab.recipe import LENGTH_KEYS, PLAN_KEYS
from bnlab.runs import Run, check_free, find_run, new_run
from bnlab.training import build, loop
from bnlab.training.checkpoint import read_state
from bnlab.training.finetune import load_pretrained, read_history, write_history
from bnlab.training.no_effect import Situation, without_effect
from bnlab.training.session import Report, Session, TrainingResult, write_refused


def train(
    data: Path,
    settings: Settings,
    *,
    root: Path,
    name: str | None,
    strict: bool,
    progress: Progress,
    report: Report = lambda result: None,
    began: float | None = None,
) -> TrainingResult:
    """Train a new run on DATA, and `report` its result. A time budget counts from `began`, a time.monotonic().

    Raises:
        BnlabError: DATA, the recipe or the name cannot be used; the training diverged; the disk or memory is full.
        Interrupted: Ctrl-C; a checkpoint was saved.
    """
    began = time.monotonic() if began is None else began
    check_free(root, name)
    prepared = build.prepare(data, settings, strict=strict, progress=progress)
    dataset = prepared.dataset
    check_unchanged(dataset.in_split("train", "val"))
    run = new_run(root, name)
    with run.locked():
        write_split_csv(run.split, dataset.photos)
        dataset.place.record(run.folder)
        write_json(run.environment, environment(prepared.device))
        write_refused(run, dataset.refused)
        if prepared.settings.recipe.init is not None:
            write_history(run, prepared.history)  # a resume may no longer find the file in `init`
        write_atomic(run.recipe, to_yaml(prepared.settings))
        session = Session(run, prepared, progress, report, began)
        with _no_run_if_it_does_not_begin(run), session.running() as callbacks:
            loop.fit(session.context, session.state, callbacks, progress=progress)
        return session.reported()


def resume(
    name: str | None,
    *,
    root: Path,
    changes: Mapping[str, Any],
    progress: Progress,
    data: Path | None = None,
    report: Report = lambda result: None,
    began: float | None = None,
) -> TrainingResult:
    """Resume a run, the latest one unless named. It ends in the weights that an uninterrupted training has.

    `changes` may set recipe keys that change no result, and epochs or steps, for a longer training. DATA is where the
    photos are now, if they were moved. A resume that is refused changes no file.

    Raises:
        BnlabError: there is no such run, another training uses it, its photos are gone or have changed, or its schedule
            does not go on.
        Interrupted: Ctrl-C; a checkpoint was saved.
    """
    began = time.monotonic() if began is None else began
    run = find_run(root, name)
    with run.locked():
        # Before the recipe, whose keys may have other names in a run of another version.
        asked = read_state(run)["recipe"] if run.state.exists() else {}
        written = read_recipe_file(run.recipe)
        settings = with_changes(written, changes, YOURS)
        if asked.get("time"):  # recipe.yaml has the steps that it came to
            settings = with_changes(settings, {key: asked[key] for key in PLAN_KEYS}, "time")
        recipe, device = settings.recipe, choose_device(settings.recipe.device)
        dataset = open_recorded_data(
            run.split,
            data=data,
            splits=("train", "val"),
            remedy=f"restore them, pass their folder ({run.resume_command('DATA')}), or begin a new run",
            progress=progress,
        )
        network, frozen = build.new_network(recipe, classes=len(dataset.classes))
        for sentence in without_effect(settings, Situation(recipe=recipe, network=network)):
            progress.warn(sentence)
        if recipe.init is not None and not run.state.exists():
            load_pretrained(network, dataset.classes, recipe.init, progress)
        before, now = read_json(run.environment), environment(device)
        for key in ("device", "gpu", "threads", "processor", "versions"):
            if before.get(key) != now[key]:
                progress.warn(f"this run began with other {key}, so it does not go on bit for bit")
        history = NO_HISTORY if recipe.init is None else read_history(run)
        prepared = build.PreparedTraining(
            settings=settings, device=device, dataset=dataset, network=network, frozen=frozen, history=history
        )
        longer = changes.keys() & LENGTH_KEYS
        session = Session(run, prepared, progress, report, began, longer=bool(longer))
        remove_drafts(run.folder)
        if data is not None or not (run.folder / DATA_JSON).exists():
            dataset.place.record(run.folder)
        if any(getattr(written.recipe, key) != getattr(recipe, key) for key in longer):
            length = f"{plural(session.state.plan.steps, 'step')} ({plural(session.state.plan.epochs, 'epoch')}) in all"
            progress.note(f"run {printable(run.folder)} now has {length}")
            origin = f"{YOURS}, on a resume after {plural(session.state.epoch, 'epoch')}"
            settings = with_changes(settings, {key: changes[key] for key in longer}, origin)
            write_atomic(run.recipe, with_lines_of(run.recipe.read_text("utf-8"), settings, longer))
        with session.running() as callbacks:
            loop.fit(session.context, session.state, callbacks, progress=progress)
        return session.reported()


@contextmanager
def _no_run_if_it_does_not_begin(run: Run) -> Iterator[None]:
    """Leave the name free where the training is refused before its first checkpoint, such as for too little time."""
    try:
        yield
    except UsageError:
        if not run.state.exists():
            run.recipe.unlink(missing_ok=True)
        raise
