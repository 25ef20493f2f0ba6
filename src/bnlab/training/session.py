"""A training of a run folder: its callbacks, its files, its checkpoints and its messages."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from bnlab.classifier.evaluate import Evaluation, evaluate
from bnlab.classifier.file import Card, save_classifier
from bnlab.classifier.predict import Classifier
from bnlab.classifier.seen import History, SeenCount, SeenPhotos, photos_by_split
from bnlab.config import with_changes, with_lines_of
from bnlab.data.scan import Refusal, Result
from bnlab.errors import Interrupted, PhotoError, plural, printable, quoted
from bnlab.files import (
    file_sha256,
    read_csv,
    storage_errors,
    write_atomic,
    write_csv,
)
from bnlab.health.bn_monitor import BNMonitor
from bnlab.health.check import Finding
from bnlab.machine import versions
from bnlab.nets.freeze import Frozen
from bnlab.progress import NullProgress, Progress
from bnlab.recipe import MACHINE_KEYS, PLAN_KEYS
from bnlab.runs import Run
from bnlab.training import build, loop
from bnlab.training.checkpoint import load_state, save_state
from bnlab.training.events import event_writer, scalars
from bnlab.training.memory_advice import batch_errors
from bnlab.training.schedule import Plan
from bnlab.training.state import Row, TrainState, describe, metrics_row, out_of_patience, record_validation
from bnlab.training.time_budget import TimeBudget
from bnlab.training.validate import ValidationResult, Validator


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
    seen: SeenCount
    """how many photos of val the earlier trainings saw, from whose weights it started"""
    classifier: Classifier
    """that of the best epoch"""

    def __repr__(self) -> str:
        top1 = f"val top-1 {self.val_top1:.1%} (n = {self.evaluation.n})"
        return self._line(f"{self.run.folder}", top1, plural(self.epochs, "epoch"), f"{self.seconds:.0f} s")

    def to_json(self) -> dict[str, Any]:
        """The document of `bnlab train --json`."""
        return {
            "run": str(self.run.folder),
            "best": str(self.run.best),
            **{key: getattr(self, key) for key in ("epochs", "val_top1", "seconds")},
            "frozen": asdict(self.frozen),
            "seen_in_training": self.seen.known("train"),
        }


Report = Callable[[TrainingResult], None]


class Session:
    """The training of a locked run folder, new or restored from state.pt, with the callbacks of its loop.

    `began` is the time.monotonic() from which a time budget counts. `longer` means that the user asked for more epochs.
    """

    def __init__(
        self,
        run: Run,
        prepared: build.PreparedTraining,
        progress: Progress,
        report: Report,
        began: float,
        *,
        longer: bool = False,
    ) -> None:
        recipe, dataset = prepared.settings.recipe, prepared.dataset
        self.report = report
        train_cache, sample_cache, val_cache = build.make_caches(run.folder, recipe, dataset)
        self.run, self.prepared, self.progress, self.began = run, prepared, progress, began
        self.context = build.build_context(recipe, prepared.network, dataset, prepared.device, train_cache)
        val = dataset.in_split("val")
        self.seen = replace(prepared.history.seen.count(val), val=0)
        self.validator = Validator(self.context, val, sample_cache=sample_cache, val_cache=val_cache)
        self.state, device = load_state(run, recipe, self.context.parts(), longer=longer), prepared.device
        self.budget = TimeBudget(began - self.state.total_seconds, recipe.time, device) if recipe.time else None
        every = max(8, min(64, self.context.loader.batches))  # at least one window an epoch
        self.monitor = BNMonitor(self.context.network if recipe.bn_monitor else nn.Identity(), window=8, every=every)
        self.warned: set[str] = set()  # checks that the user was warned of
        self.recorded: Plan | None = None  # the plan in recipe.yaml
        self.stale: Finding | None = None  # BN102 in the latest validation, which is warned of at the end

    def reported(self) -> TrainingResult:
        """Evaluate the best classifier, and report the result."""
        best = Classifier.load(self.run.best, self.context.device)
        workers, cache = self.context.recipe.workers, self.validator.val_cache
        evaluation = evaluate(
            best,
            self.validator.photos,
            "val",
            workers=workers,
            progress=NullProgress(),
            cache=cache,
            reader=self.context.loader.reader,
        )
        result = self.result(best, evaluation, self.state)
        self.report(result)
        if self.budget:
            again = f"bnlab train DATA --recipe {quoted(self.run.recipe)}"
            self.progress.note(f"to repeat this training with the same steps: {again}")
        return result

    @contextmanager
    def running(self) -> Iterator[loop.Callbacks]:
        """Begin a new training; give the callbacks of the loop; add to errors how to go on."""
        self._report_start()
        with loop.deterministic(self.context.device), _how_to_go_on(self.run), batch_errors(self.context):
            if not self.run.state.exists():
                self._begin()
            self._record_plan(self.state)  # a run may have been killed after state.pt and before recipe.yaml
            self.card = _card(self.run, self.context, self.prepared.history)
            with event_writer(self.run, self.state.step) as self.events:
                yield loop.Callbacks(
                    validate=self.validate,
                    save=self.save,
                    epoch_done=self.epoch_done,
                    around_step=self.monitor.step,
                    replanned=self.replanned,
                )
            if self.stale:
                self.progress.warn(str(self.stale))

    def _begin(self) -> None:
        build.init_on_first_batch(self.context)
        self.state.plan = Plan.of(self.context.recipe, self.context.loader.batches)
        if self.budget:
            validate = partial(self.validator, self.context.network, NullProgress())
            self.state.plan, self.state.step_times = self.budget.planned(
                self.context, validate, self._rehearse_report, self.progress
            )
            self.state.total_seconds = time.monotonic() - self.began
        self.save(self.state)  # before any classifier is written, so that every run that has one can be resumed

    def _rehearse_report(self, validation: ValidationResult) -> None:
        """Write the report of one epoch and remove it, to measure how long that takes."""
        state = TrainState(plan=Plan(steps=1, batches=1), step=1, num_images=1)
        state.rows.append(metrics_row(state, self.context.recipe))
        record_validation(state, state.rows[0], validation)
        self.report(self.result(self.validator.classifier, validation.evaluation, state))
        self.run.report.unlink(missing_ok=True)

    def validate(self) -> ValidationResult:
        ema, began = self.context.ema, time.monotonic()
        validation = self.validator(ema.network if ema else self.context.network, self.progress)
        if self.budget:
            self.budget.validated(self.state, time.monotonic() - began)
        return validation

    def replanned(self, state: TrainState) -> Plan:
        recipe = self.context.recipe
        if self.budget:
            return self.budget.replanned(state, recipe, self.progress)
        return state.plan.repeated(recipe, state.step)

    def save(self, state: TrainState) -> None:
        save_state(self.run, state, self.context.recipe, self.context.parts())
        self._record_plan(state)

    def _record_plan(self, state: TrainState) -> None:
        """Write the steps of a training with a time budget to its recipe.yaml, if that has others."""
        if self.budget and state.plan != self.recorded:
            settings = with_changes(self.prepared.settings, _steps_made(state), "time")
            write_atomic(self.run.recipe, with_lines_of(self.run.recipe.read_text("utf-8"), settings, PLAN_KEYS))
            self.recorded = state.plan

    def epoch_done(self, state: TrainState, row: Row, validation: ValidationResult | None, is_best: bool) -> None:
        run = self.run
        if validation:
            metrics = {"split": "val", "n": len(self.validator.photos), "top1": row["val_top1"]}
            metrics["seen_in_training"] = self.seen.known("train")
            recipe = {**self.card.recipe, **(_steps_made(state) if self.budget else {})}
            card = replace(self.card, recipe=recipe, metrics=metrics | {"loss": row["val_loss"], "epoch": row["epoch"]})
            if is_best:
                save_classifier(run.best, self.validator.network, card)
            save_classifier(run.last, self.validator.network, card)
            health = self.monitor.report(validation.recalibration, validation.scores)
            self.stale = None
        else:
            health = self.monitor.report()
        write_csv(run.metrics, row, (r.values() for r in state.rows))
        write_csv(run.health, *health.table())
        with storage_errors(run.events):
            for tag, value in scalars(row, health).items():
                self.events.add_scalar(tag, value, row["step"])
            self.events.flush()
        self.progress.note(describe(row, state.plan.epochs, is_best))
        self.context.loader.reader.report(self.progress)
        for finding in health.findings():
            if finding.id == "BN102":  # statistics always lag while the learning rate is high
                self.stale = finding
            elif finding.id not in self.warned:
                self.progress.warn(str(finding))
                self.warned.add(finding.id)

    def _report_start(self) -> None:
        state, recipe, dataset = self.state, self.context.recipe, self.prepared.dataset
        name, plan, frozen = printable(self.run.folder), self.state.plan, self.prepared.frozen
        if plan.steps and (state.epoch >= plan.epochs or out_of_patience(state, recipe)):
            self.progress.note(f"run {name} is complete: {state.epoch} of {plural(plan.epochs, 'epoch')}")
            return
        photos = ", ".join(f"{len(dataset.in_split(split))} {split}" for split in ("train", "val"))
        doing = f"resuming {name} at step {state.step} of {plan.steps}" if state.step else f"training {name}"
        self.progress.note(
            f"{doing}: {recipe.network}, {len(dataset.classes)} classes, {photos}, {recipe.size} px, "
            f"on {self.context.device} in {recipe.precision}"
        )
        if str(frozen):
            self.progress.note(f"frozen: {frozen}")
        if recipe.patience and state.epoch and state.patience_from == state.epoch:
            self.progress.note(f"patience had ended this run, and counts anew from epoch {state.epoch}")

    def result(self, classifier: Classifier, evaluation: Evaluation, state: TrainState) -> TrainingResult:
        assert state.best is not None  # at least one epoch has ended
        return TrainingResult(
            run=self.run,
            epochs=state.epoch,
            val_top1=float(state.best["val_top1"] or 0.0),
            seconds=state.total_seconds,
            evaluation=evaluation,
            rows=state.rows,
            frozen=self.prepared.frozen,
            seen=self.seen,
            classifier=classifier,
            refused=_read_refused(self.run),  # a resume has refused none itself
        )


def write_refused(run: Run, refused: Sequence[Refusal]) -> None:
    """Write refused.csv, if there is anything to write; its column `kind` is photo or folder."""
    if refused:
        rows = ((r.path, r.label, r.reason, "folder" if r.is_folder else "photo") for r in refused)
        write_csv(run.refused, ("path", "class", "reason", "kind"), rows)


def _read_refused(run: Run) -> tuple[Refusal, ...]:
    rows = read_csv(run.refused) if run.refused.exists() else ()
    return tuple(Refusal(row["path"], row["reason"], row["class"], row.get("kind") == "folder") for row in rows)


def _steps_made(state: TrainState) -> dict[str, Any]:
    """The PLAN_KEYS of a recipe that repeats a training with a time budget, without one."""
    return {"time": None, "steps": state.plan.steps, "plan": state.plan.changes}


def _card(run: Run, context: build.TrainingContext, history: History) -> Card:
    recipe = context.recipe
    settings = recipe.model_dump(mode="json", exclude=set(MACHINE_KEYS))
    if recipe.init is not None:
        settings["init"] = Path(recipe.init).name  # cards are passed on, and the folder is private
    photos = context.dataset.photos
    return replace(
        build.card_of(context),
        recipe=settings,
        versions=versions(),
        split_sha256=file_sha256(run.split),
        photos=photos_by_split(photos),
        ancestors=history.ancestors,
        seen=history.seen | SeenPhotos.of(photos),
    )


@contextmanager
def _how_to_go_on(run: Run) -> Iterator[None]:
    """Add the command that resumes the run to interruptions and to errors of photos that can no longer be read."""
    command = run.resume_command()
    try:
        yield
    except PhotoError as error:
        raise PhotoError(error.path, error.reason, f"restore it, and resume with: {command}") from None
    except KeyboardInterrupt as stop:
        if not run.state.exists():
            raise
        what = f"{stop}, and saved" if isinstance(stop, Interrupted) else "interrupted after the last checkpoint"
        raise Interrupted(f"{what}; resume with: {command}") from None
