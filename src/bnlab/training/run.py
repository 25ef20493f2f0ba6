"""Trains a new run or resumes one: its files, its checkpoints and its messages."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from bnlab.classifier.evaluate import Evaluation, evaluate
from bnlab.classifier.file import Card, save_classifier
from bnlab.classifier.predict import Classifier
from bnlab.config import YOURS, Settings, read_recipe_file, to_yaml, with_changes
from bnlab.data.dataset import open_recorded_data
from bnlab.data.scan import Refusal, Result
from bnlab.data.split_csv import write_split_csv
from bnlab.errors import Interrupted, PhotoError, printable, quoted
from bnlab.files import (
    file_sha256,
    read_csv,
    read_json,
    remove_drafts,
    storage_errors,
    write_atomic,
    write_csv,
    write_json,
)
from bnlab.health.bn_monitor import BNMonitor
from bnlab.health.findings import Finding, Health
from bnlab.machine import choose_device, environment, versions
from bnlab.nets.freeze import Frozen
from bnlab.progress import NullProgress, Progress
from bnlab.recipe import MACHINE_KEYS
from bnlab.runs import RUNS, Run, check_free, find_run, new_run
from bnlab.training import build, loop
from bnlab.training.checkpoint import load_state, read_state, save_state
from bnlab.training.finetune import load_pretrained
from bnlab.training.memory_advice import batch_errors
from bnlab.training.schedule import Plan
from bnlab.training.state import Row, TrainState, out_of_patience
from bnlab.training.time_budget import TimeBudget
from bnlab.training.validate import ValidationResult, Validator

_SCALARS = ("train_loss", "train_top1", "val_loss", "val_top1", "running_top1", "learning_rate", "images_per_second")
_LAYER_SCALARS = ("mean_off", "variance_off", "effective_batch", "dead", "gamma_near_zero")


@dataclass(frozen=True, kw_only=True)
class TrainingResult(Result):
    run: Run
    epochs: int
    """number of epochs trained, over all resumes"""
    val_top1: float
    """accuracy of the best epoch on val, in 0..1"""
    seconds: float
    """time spent training and validating, over all resumes"""
    evaluation: Evaluation
    """of the best classifier on val"""
    rows: list[Row]
    """metrics, one row an epoch"""
    frozen: Frozen
    classifier: Classifier = field(repr=False)
    """that of the best epoch"""

    def to_json(self) -> dict[str, Any]:
        """The document of `bnlab train --json`."""
        return {
            "run": str(self.run.folder),
            "best": str(self.run.best),
            **{key: getattr(self, key) for key in ("epochs", "val_top1", "seconds")},
            "frozen": asdict(self.frozen),
        }


def train(
    data: Path, settings: Settings, *, root: Path, name: str | None, strict: bool, progress: Progress
) -> TrainingResult:
    """Train a new run on DATA.

    Raises:
        BnlabError: DATA, the recipe or the name cannot be used; the training diverged; the disk or memory is full.
        Interrupted: Ctrl-C; a checkpoint was saved.
    """
    began = time.monotonic()
    check_free(root, name)
    prepared = build.prepare(data, settings, strict=strict, progress=progress)
    dataset = prepared.dataset
    run = new_run(root, name)
    with run.locked():
        write_split_csv(run.split, dataset.photos)
        write_json(run.environment, environment(prepared.device))
        if dataset.refused:
            write_csv(run.refused, ("path", "class", "reason"), ((r.path, r.label, r.reason) for r in dataset.refused))
        write_atomic(run.recipe, to_yaml(prepared.settings))
        session = _Session(run, prepared, progress, began)
        with session.running() as callbacks:
            loop.fit(session.context, session.state, callbacks, progress=progress)
        return session.result()


def resume(name: str | None, *, root: Path, changes: Mapping[str, Any], progress: Progress) -> TrainingResult:
    """Resume a run, the latest one unless named. It ends in the weights that an uninterrupted training has.

    `changes` may set recipe keys that change no result.

    Raises:
        BnlabError: there is no such run, another training uses it, or its photos are gone.
        Interrupted: Ctrl-C; a checkpoint was saved.
    """
    began = time.monotonic()
    run = find_run(root, name)
    with run.locked():
        remove_drafts(run.folder)
        if run.state.exists():
            read_state(run)  # before the recipe, whose keys may have other names in a run of another version
        settings = with_changes(read_recipe_file(run.recipe), changes, YOURS)
        recipe, device = settings.recipe, choose_device(settings.recipe.device)
        dataset = open_recorded_data(run.split)
        network, frozen = build.new_network(recipe, classes=len(dataset.classes))
        if recipe.init is not None and not run.state.exists():
            load_pretrained(network, dataset.classes, recipe.init, progress)
        before, now = read_json(run.environment), environment(device)
        for key in ("device", "gpu", "threads", "processor", "versions"):
            if before.get(key) != now[key]:
                progress.warn(f"this run began with other {key}, so it does not go on bit for bit")
        prepared = build.PreparedTraining(
            settings=settings, device=device, dataset=dataset, network=network, frozen=frozen
        )
        session = _Session(run, prepared, progress, began)
        with session.running() as callbacks:
            loop.fit(session.context, session.state, callbacks, progress=progress)
        return session.result()


class _Session:
    """The training of a locked run folder, new or restored from state.pt, with the callbacks of its loop.

    `began` is the time.monotonic() from which a time budget counts.
    """

    def __init__(self, run: Run, prepared: build.PreparedTraining, progress: Progress, began: float) -> None:
        recipe, dataset = prepared.settings.recipe, prepared.dataset
        train_cache, sample_cache, val_cache = build.make_caches(run.folder, recipe, dataset)
        self.run, self.prepared, self.progress, self.began = run, prepared, progress, began
        self.context = build.build_context(recipe, prepared.network, dataset, prepared.device, train_cache)
        val = dataset.in_split("val")
        self.validator = Validator(self.context, val, sample_cache=sample_cache, val_cache=val_cache)
        self.state = load_state(run, recipe, self.context.parts())
        self.budget = TimeBudget(began - self.state.total_seconds, recipe.time) if recipe.time else None
        every = max(8, min(64, self.context.loader.batches))  # at least one window an epoch
        self.monitor = BNMonitor(self.context.network if recipe.bn_monitor else nn.Identity(), window=8, every=every)
        self.warned: set[str] = set()  # checks that the user was warned of
        self.stale: Finding | None = None  # BN102 in the latest validation, which is warned of at the end

    @contextmanager
    def running(self) -> Iterator[loop.Callbacks]:
        """Begin a new training; give the callbacks of the loop; add to errors how to go on."""
        self._report_start()
        with loop.deterministic(self.context.device), _how_to_go_on(self.run), batch_errors(self.context):
            if not self.run.state.exists():
                self._begin()
            self.card = _card(self.run, self.context)
            with _event_writer(self.run, self.state.step) as self.events:
                yield loop.Callbacks(
                    validate=self.validate, save=self.save, epoch_done=self.epoch_done, around_step=self.monitor.step
                )
            if self.stale:
                self.progress.warn(str(self.stale))

    def _begin(self) -> None:
        build.init_on_first_batch(self.context)
        if self.budget:
            validate = partial(self.validator, self.context.network, NullProgress())
            recipe, self.state.step_times = self.budget.planned(self.context, validate, self.progress)
            planned = {"steps": recipe.steps, "validate_every": recipe.validate_every}
            write_atomic(self.run.recipe, to_yaml(with_changes(self.prepared.settings, planned, "time")))
            self.context = replace(self.context, recipe=recipe)
            self.state.total_seconds = time.monotonic() - self.began
        self.state.plan = Plan.of(self.context.recipe, self.context.loader.batches)
        self.save(self.state)  # before any classifier is written, so that every run that has one can be resumed

    def validate(self) -> ValidationResult:
        ema = self.context.ema
        return self.validator(ema.network if ema else self.context.network, self.progress)

    def save(self, state: TrainState) -> None:
        if self.budget:
            state.plan = self.budget.replanned(state, self.context.recipe, self.progress)
        save_state(self.run, state, self.context.recipe, self.context.parts())

    def epoch_done(self, state: TrainState, row: Row, validation: ValidationResult | None, is_best: bool) -> None:
        run = self.run
        if validation:
            metrics = {"split": "val", "n": len(self.validator.photos), "top1": row["val_top1"]}
            card = replace(self.card, metrics=metrics | {"loss": row["val_loss"], "epoch": row["epoch"]})
            if is_best:
                save_classifier(run.best, self.validator.network, card)
            save_classifier(run.last, self.validator.network, card)
            health = self.monitor.report(validation.recalibration, validation.statistics_cost)
            self.stale = None
        else:
            health = self.monitor.report()
        write_csv(run.metrics, row, (r.values() for r in state.rows))
        write_csv(run.health, *health.table())
        with storage_errors(run.events):
            for tag, value in _scalars(row, health).items():
                self.events.add_scalar(tag, value, row["step"])
            self.events.flush()
        self.progress.note(_describe(row, state.plan.epochs, is_best))
        for finding in health.findings():
            if finding.code == "BN102":  # statistics always lag while the learning rate is high
                self.stale = finding
            elif finding.code not in self.warned:
                self.progress.warn(str(finding))
                self.warned.add(finding.code)

    def _report_start(self) -> None:
        state, recipe, dataset = self.state, self.context.recipe, self.prepared.dataset
        name, plan, frozen = printable(self.run.folder), self.state.plan, self.prepared.frozen
        if plan.steps and (state.epoch >= plan.epochs or out_of_patience(state, recipe)):
            self.progress.note(f"run {name} is complete: {state.epoch} of {plan.epochs} epochs")
            return
        photos = ", ".join(f"{len(dataset.in_split(split))} {split}" for split in ("train", "val"))
        doing = f"resuming {name} at step {state.step}" if state.step else f"training {name}"
        self.progress.note(
            f"{doing}: {recipe.network}, {len(dataset.classes)} classes, {photos}, {recipe.size} px, "
            f"on {self.context.device} in {recipe.precision}"
        )
        if str(frozen):
            self.progress.note(f"frozen: {frozen}")

    def result(self) -> TrainingResult:
        state = self.state
        assert state.best is not None  # at least one epoch has ended
        refused = read_csv(self.run.refused) if self.run.refused.exists() else ()  # a resume has refused none itself
        best, workers = Classifier.load(self.run.best, self.context.device), self.context.recipe.workers
        return TrainingResult(
            run=self.run,
            epochs=state.epoch,
            val_top1=float(state.best["val_top1"] or 0.0),
            seconds=state.total_seconds,
            evaluation=evaluate(best, self.validator.photos, "val", workers=workers, progress=NullProgress()),
            rows=state.rows,
            frozen=self.prepared.frozen,
            classifier=best,
            refused=tuple(Refusal(row["path"], row["reason"], row["class"]) for row in refused),
        )


def _card(run: Run, context: build.TrainingContext) -> Card:
    recipe = context.recipe
    settings = recipe.model_dump(mode="json", exclude=set(MACHINE_KEYS))
    if recipe.init is not None:
        settings["init"] = Path(recipe.init).name  # cards are passed on, and the folder is private
    return replace(build.card_of(context), recipe=settings, versions=versions(), split_sha256=file_sha256(run.split))


@contextmanager
def _how_to_go_on(run: Run) -> Iterator[None]:
    """Add the command that resumes the run to interruptions and to errors of photos that can no longer be read."""
    command = f"bnlab.resume({run.name!r}, runs={str(run.folder.parent)!r})"
    if run.folder.parent == RUNS:
        command = f"bnlab train --resume --name {quoted(run.name)}"
    try:
        yield
    except PhotoError as error:
        raise PhotoError(error.path, error.reason, f"restore it, and resume with: {command}") from None
    except KeyboardInterrupt as stop:
        if not run.state.exists():
            raise
        what = f"{stop}, and saved" if isinstance(stop, Interrupted) else "interrupted after the last checkpoint"
        raise Interrupted(f"{what}; resume with: {command}") from None


def _describe(row: Row, epochs: int, is_best: bool) -> str:
    val = ""
    if row["val_top1"] is not None:
        val = f"val {row['val_top1']:.1%} (loss {row['val_loss']:.3f})  "
        if row["running_top1"] is not None:
            val += f"by running statistics {row['running_top1']:.1%} "
            val += f"(recalibration {row['recalibration_seconds']:.1f} s)  "
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  "
        f"loss {row['train_loss']:.3f}  train {row['train_top1']:.1%}  {val}{row['images_per_second']:.0f} images/s"
        + ("  best so far" if is_best else "")
    )


def _scalars(row: Row, health: Health) -> dict[str, float]:
    totals = {key: row[key] for key in _SCALARS} | health.scalars()
    values = {key.replace("_", "/", 1): value for key, value in totals.items()}
    for layer in health.layers:
        values |= {f"norm_{key}/{layer.name}": getattr(layer, key) for key in _LAYER_SCALARS}
    return {tag: value for tag, value in values.items() if value is not None}


@contextmanager
def _event_writer(run: Run, step: int) -> Iterator[Any]:
    """TensorBoard's writer, which hides the events after `step` that a killed process left."""
    from torch.utils.tensorboard import SummaryWriter

    with storage_errors(run.events):
        writer = SummaryWriter(run.events, purge_step=step + 1 if step else None)
    try:
        yield writer
    finally:
        with storage_errors(run.events):
            writer.close()
