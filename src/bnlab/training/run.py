"""One training from DATA to a finished run folder."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from bnlab.classifier.card import Card
from bnlab.classifier.evaluate import Evaluation, evaluate
from bnlab.classifier.file import save_classifier
from bnlab.classifier.predict import Classifier
from bnlab.config import YOURS, Settings, read_recipe_file, to_yaml, with_changes
from bnlab.data.dataset import Dataset, open_recorded_data
from bnlab.data.split_csv import write_split_csv
from bnlab.errors import Interrupted, PhotoError
from bnlab.files import file_sha256, remove_drafts, write_atomic, write_csv, write_json
from bnlab.health.bn_monitor import BNMonitor
from bnlab.health.findings import Finding, Health
from bnlab.machine import choose_device, environment, versions
from bnlab.nets.blocks import is_normalised
from bnlab.nets.build import move_network
from bnlab.nets.freeze import Frozen
from bnlab.nets.network import TableNetwork
from bnlab.progress import NullProgress, Progress
from bnlab.recipe import MACHINE_KEYS, Recipe
from bnlab.runs import Run, check_free, find_run, new_run
from bnlab.training import checkpoint, loop
from bnlab.training.build import make_bn_monitor, make_caches, make_context, preprocessing_of
from bnlab.training.checkpoint import Row, TrainState
from bnlab.training.finetune import load_pretrained, new_network
from bnlab.training.messages import describe, how_to_resume, report_start, warn_changed_machine
from bnlab.training.schedule import Plan
from bnlab.training.setup import SetUp, batch_errors, exact, init_on_first_batch, set_up
from bnlab.training.tensorboard import tensorboard
from bnlab.training.time_budget import TimeBudget
from bnlab.training.validate import ValidationResult, Validator


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a training came to."""

    run: Run
    epochs: int
    """that were trained in all"""
    val_top1: float
    """accuracy of the best epoch on val, in 0..1"""
    seconds: float
    """spent training and validating, over all sittings"""
    evaluation: Evaluation
    """of the best classifier on val"""
    rows: list[Row]
    """metrics, one row an epoch"""
    frozen: Frozen
    """what of the network was not trained"""

    def to_json(self) -> dict[str, Any]:
        """The document of `bnlab train --json`."""
        return {
            "run": str(self.run.folder),
            "best": str(self.run.best),
            "epochs": self.epochs,
            "val_top1": self.val_top1,
            "seconds": self.seconds,
            "frozen": asdict(self.frozen),
        }


def train(
    data: Path, settings: Settings, *, root: Path, name: str | None, strict: bool, progress: Progress
) -> TrainingResult:
    """Train a new run on DATA.

    Raises:
        BnlabError: DATA, the recipe or the name cannot be used; the training diverged; the disk or memory is full.
        Interrupted: Ctrl-C; what a resume needs was saved.
    """
    began = time.monotonic()
    check_free(root, name)
    ready = set_up(data, settings, strict=strict, progress=progress)
    dataset = ready.dataset
    run = new_run(root, name)
    with run.locked():
        write_split_csv(run.split, dataset.photos)
        write_json(run.environment, environment(ready.device))
        if dataset.refused:
            write_csv(run.refused, ("path", "class", "reason"), ((r.path, r.label, r.reason) for r in dataset.refused))
        write_atomic(run.recipe, to_yaml(ready.settings))
        return _sit(run, ready, progress, began)


def resume(name: str | None, *, root: Path, changes: Mapping[str, Any], progress: Progress) -> TrainingResult:
    """Go on with a run, the latest unless named, as if it had never stopped. `changes` may set what changes no result.

    Raises:
        BnlabError: there is no such run, another training has it, or its photos are gone.
        Interrupted: Ctrl-C; what a resume needs was saved.
    """
    began = time.monotonic()
    run = find_run(root, name)
    with run.locked():
        remove_drafts(run.folder)
        settings = with_changes(read_recipe_file(run.recipe), changes, YOURS)
        recipe = settings.recipe
        device = choose_device(recipe.device)
        dataset = open_recorded_data(run.split)
        network, frozen = new_network(recipe, classes=len(dataset.classes))
        if recipe.init is not None and not run.state.exists():
            load_pretrained(network, dataset.classes, recipe.init, progress)
        warn_changed_machine(run, device, progress)
        ready = SetUp(settings=settings, device=device, dataset=dataset, network=network, frozen=frozen)
        return _sit(run, ready, progress, began)


def _sit(run: Run, ready: SetUp, progress: Progress, began: float) -> TrainingResult:
    """One sitting, that began at a time.monotonic(), at a run whose folder is made and locked."""
    recipe, dataset, device = ready.settings.recipe, ready.dataset, ready.device
    network = move_network(ready.network, device)
    caches = make_caches(run, recipe, dataset)
    context = make_context(recipe, network, dataset, device, caches.train)
    judge = Validator(
        network,
        _card(run, recipe, network, dataset),
        device,
        loader=context.loader,
        val=dataset.in_split("val"),
        recalibrate=recipe.recalibration_images if is_normalised(network) and not recipe.freeze_bn else 0,
        caches=(caches.sample, caches.val),
    )
    state = checkpoint.load_state(run, recipe, _parts(context))
    budget = TimeBudget(began - state.total_seconds, recipe.time) if recipe.time else None
    report_start(run, state, recipe, ready.frozen, dataset, device, progress)
    with ExitStack() as stack:
        stack.enter_context(exact(device))
        stack.enter_context(_told(run, context))
        is_new = not run.state.exists()
        if is_new:
            init_on_first_batch(context)
            if budget:
                recipe, state.step_times = budget.planned(context, partial(judge, network, NullProgress()), progress)
                planned = {"steps": recipe.steps, "validate_every": recipe.validate_every}
                write_atomic(run.recipe, to_yaml(with_changes(ready.settings, planned, "time")))
                context = replace(context, recipe=recipe)
                state.total_seconds = time.monotonic() - began
            state.plan = Plan.of(recipe, context.loader.batches)
        sitting = _Sitting(
            run=run,
            context=context,
            judge=judge,
            card=_card(run, recipe, network, dataset),
            budget=budget,
            watch=make_bn_monitor(context),
            log=stack.enter_context(tensorboard(run, state.step)),
            progress=progress,
        )
        if is_new:
            sitting.save(state)  # before any classifier is written: whatever happens then, there is a state
        hooks = loop.Callbacks(
            judge=sitting.validate,
            save=sitting.save,
            epoch_done=sitting.epoch_done,
            watched=sitting.watch.step,
        )
        loop.fit(context, state, hooks, progress=progress)
        if sitting.stale:
            progress.warn(str(sitting.stale))
    return _result(run, state, ready.frozen, dataset, device, recipe.workers)


@dataclass(kw_only=True)
class _Sitting:
    """What the loop hands on, and who takes it."""

    run: Run
    context: loop.TrainingContext
    judge: Validator
    card: Card
    budget: TimeBudget | None
    watch: BNMonitor
    log: Callable[[Row, Health], None]
    progress: Progress
    warned: set[str] = field(default_factory=set)
    stale: Finding | None = None
    """BN102 of the last validation: reported at the end, since statistics lag while the learning rate is high"""
    validation: ValidationResult | None = None
    """of the epoch that is ending"""

    def validate(self) -> ValidationResult:
        ema = self.context.ema
        self.validation = self.judge(ema.network if ema else self.context.network, self.progress)
        return self.validation

    def save(self, state: TrainState) -> None:
        recipe = self.context.recipe
        if self.budget:
            state.plan = self.budget.replanned(state, recipe, self.progress)
        checkpoint.save_state(self.run, state, recipe, _parts(self.context))

    def epoch_done(self, state: TrainState, row: Row, is_best: bool) -> None:
        run = self.run
        if row["val_top1"] is not None:
            metrics = {"split": "val", "n": len(self.judge.val), "top1": row["val_top1"], "loss": row["val_loss"]}
            card = replace(self.card, metrics=metrics | {"epoch": row["epoch"]})
            if is_best:
                save_classifier(run.best, self.judge.network, card)
            save_classifier(run.last, self.judge.network, card)
        validation, self.validation = self.validation, None
        measured = (validation.recalibration, validation.statistics_cost) if validation else ()
        health = self.watch.report(*measured)
        write_csv(run.metrics, row, (r.values() for r in state.rows))
        write_csv(run.health, *health.table())
        self.log(row, health)
        self.progress.note(describe(row, state.plan.epochs, is_best))
        if validation:
            self.stale = None
        for finding in health.findings():
            if finding.code == "BN102":
                self.stale = finding
            elif finding.code not in self.warned:
                self.progress.warn(str(finding))
                self.warned.add(finding.code)


def _parts(context: loop.TrainingContext) -> dict[str, checkpoint.Stateful]:
    """What a resume puts back."""
    parts: dict[str, checkpoint.Stateful] = {"network": context.network, "optimizer": context.optimizer}
    return parts | ({"average": context.ema.network} if context.ema else {})


def _card(run: Run, recipe: Recipe, network: TableNetwork, dataset: Dataset) -> Card:
    settings = recipe.model_dump(mode="json", exclude=set(MACHINE_KEYS))
    if recipe.init is not None:
        settings["init"] = Path(recipe.init).name  # the card travels; where the file lay is nobody's business
    return Card(
        network=recipe.network,
        arguments=network.arguments,
        classes=dataset.classes,
        preprocessing=preprocessing_of(recipe),
        recipe=settings,
        versions=versions(),
        split_sha256=file_sha256(run.split),
    )


def _result(run: Run, state: TrainState, frozen: Frozen, dataset: Dataset, device: str, workers: int) -> TrainingResult:
    assert state.best is not None  # at least one epoch has ended
    best = Classifier.load(run.best, device)
    return TrainingResult(
        run=run,
        epochs=state.epoch,
        val_top1=float(state.best["val_top1"] or 0.0),
        seconds=state.total_seconds,
        evaluation=evaluate(best, dataset.in_split("val"), "val", workers=workers, progress=NullProgress()),
        rows=state.rows,
        frozen=frozen,
    )


@contextmanager
def _told(run: Run, context: loop.TrainingContext) -> Iterator[None]:
    """Say of an interruption, or of a photo gone bad, how to go on, and of full memory what would fit."""
    try:
        with batch_errors(context):
            yield
    except PhotoError as error:
        raise PhotoError(
            error.path, error.reason, f"put it back as it was, and go on with: {how_to_resume(run)}"
        ) from None
    except Interrupted as interruption:
        raise Interrupted(f"{interruption.message}, and saved; go on with: {how_to_resume(run)}") from None
    except KeyboardInterrupt:  # before the loop listens, or after
        if not run.state.exists():
            raise
        raise Interrupted(f"interrupted between two steps, and saved; go on with: {how_to_resume(run)}") from None
