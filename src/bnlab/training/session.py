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
from bnlab.data.listing import write_list
from bnlab.data.source import Source, open_recorded_data
from bnlab.errors import Interrupted, PhotoError
from bnlab.files import file_sha256, remove_drafts, write_atomic, write_csv, write_json
from bnlab.machine import choose_device, environment, versions
from bnlab.nets.blocks import is_normalised
from bnlab.nets.build import to_device
from bnlab.nets.freeze import Frozen
from bnlab.nets.network import TableNetwork
from bnlab.progress import Progress, Silent
from bnlab.recipe import MACHINE_KEYS, Recipe
from bnlab.runs import Run, check_free, find_run, new_run
from bnlab.training import checkpoint, loop
from bnlab.training.board import tensorboard
from bnlab.training.budget import Budget
from bnlab.training.checkpoint import Position, Row
from bnlab.training.health import Health
from bnlab.training.judge import Judge, Judgement
from bnlab.training.schedule import Plan
from bnlab.training.setup import SetUp, batch_errors, exact, fit_first_batch, set_up
from bnlab.training.start import load_into, new_network
from bnlab.training.tell import describe, how_to_resume, tell_changes, tell_position
from bnlab.training.trainee import make_caches, make_trainee, make_watch, view_of
from bnlab.training.watch import Watch


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
    source = ready.source
    run = new_run(root, name)
    with run.locked():
        write_list(run.split, source.photos)
        write_json(run.environment, environment(ready.device))
        if source.refused:
            write_csv(run.refused, ("path", "class", "reason"), ((r.path, r.label, r.reason) for r in source.refused))
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
        source = open_recorded_data(run.split)
        network, frozen = new_network(recipe, classes=len(source.classes))
        if recipe.init is not None and not run.state.exists():
            load_into(network, source.classes, recipe.init, progress)
        tell_changes(run, device, progress)
        ready = SetUp(settings=settings, device=device, source=source, network=network, frozen=frozen)
        return _sit(run, ready, progress, began)


def _sit(run: Run, ready: SetUp, progress: Progress, began: float) -> TrainingResult:
    """One sitting, that began at a time.monotonic(), at a run whose folder is made and locked."""
    recipe, source, device = ready.settings.recipe, ready.source, ready.device
    network = to_device(ready.network, device)
    caches = make_caches(run, recipe, source)
    trainee = make_trainee(recipe, network, source, device, caches.train)
    judge = Judge(
        network,
        _card(run, recipe, network, source),
        device,
        loader=trainee.loader,
        val=source.side("val"),
        recalibrate=recipe.recalibrate if is_normalised(network) and not recipe.freeze_bn else 0,
        caches=(caches.sample, caches.val),
    )
    position = checkpoint.load_state(run, recipe, _parts(trainee))
    budget = Budget(began - position.total_seconds, recipe.time) if recipe.time else None
    tell_position(run, position, recipe, ready.frozen, source, device, progress)
    with ExitStack() as stack:
        stack.enter_context(exact(device))
        stack.enter_context(_told(run, trainee))
        is_new = not run.state.exists()
        if is_new:
            fit_first_batch(trainee)
            if budget:
                recipe, position.pace = budget.planned(trainee, partial(judge, network, Silent()), progress)
                planned = {"steps": recipe.steps, "judge_every": recipe.judge_every}
                write_atomic(run.recipe, to_yaml(with_changes(ready.settings, planned, "time")))
                trainee = replace(trainee, recipe=recipe)
                position.total_seconds = time.monotonic() - began
            position.plan = Plan.of(recipe, trainee.loader.batches)
        sitting = _Sitting(
            run=run,
            trainee=trainee,
            judge=judge,
            card=_card(run, recipe, network, source),
            budget=budget,
            watch=make_watch(trainee),
            log=stack.enter_context(tensorboard(run, position.step)),
            progress=progress,
        )
        if is_new:
            sitting.save(position)  # before any classifier is written: whatever happens then, there is a state
        hooks = loop.Hooks(
            judge=sitting.judged,
            save=sitting.save,
            epoch_done=sitting.epoch_done,
            watched=sitting.watch.watched,
        )
        loop.fit(trainee, position, hooks, progress=progress)
        if sitting.lagging:
            progress.warn(sitting.lagging)
    return _result(run, position, ready.frozen, source, device, recipe.workers)


@dataclass(kw_only=True)
class _Sitting:
    """What the loop hands on, and who takes it."""

    run: Run
    trainee: loop.Trainee
    judge: Judge
    card: Card
    budget: Budget | None
    watch: Watch
    log: Callable[[Row, Health], None]
    progress: Progress
    warned: set[str] = field(default_factory=set)
    lagging: str = ""
    """what BN102 had to say when it was last measured"""

    def judged(self) -> Judgement:
        average = self.trainee.average
        return self.judge(average.network if average else self.trainee.network, self.progress)

    def save(self, position: Position) -> None:
        recipe = self.trainee.recipe
        if self.budget:
            position.plan = self.budget.replanned(position, recipe, self.progress)
        checkpoint.save_state(self.run, position, recipe, _parts(self.trainee))

    def epoch_done(self, position: Position, row: Row, is_best: bool) -> None:
        run = self.run
        if row["val_top1"] is not None:
            metrics = {"split": "val", "n": len(self.judge.val), "top1": row["val_top1"], "loss": row["val_loss"]}
            card = replace(self.card, metrics=metrics | {"epoch": row["epoch"]})
            if is_best:
                save_classifier(run.best, self.judge.network, card)
            save_classifier(run.last, self.judge.network, card)
        health = self.watch.report()
        write_csv(run.metrics, row, (r.values() for r in position.rows))
        write_csv(run.health, *health.table())
        self.log(row, health)
        self.progress.note(describe(row, position.plan.epochs, is_best))
        for sentence in health.warnings():
            check = sentence.partition(":")[0]
            if check == "BN102":  # they always lag at the height of the learning rate: told at the end
                self.lagging = sentence
            elif check not in self.warned:
                self.progress.warn(sentence)
                self.warned.add(check)
        if health.scalars().get("norm_off_share") is not None and "BN102" not in " ".join(health.warnings()):
            self.lagging = ""


def _parts(trainee: loop.Trainee) -> dict[str, checkpoint.Stateful]:
    """What a resume puts back."""
    parts: dict[str, checkpoint.Stateful] = {"network": trainee.network, "optimizer": trainee.optimizer}
    return parts | ({"average": trainee.average.network} if trainee.average else {})


def _card(run: Run, recipe: Recipe, network: TableNetwork, source: Source) -> Card:
    settings = recipe.model_dump(mode="json", exclude=set(MACHINE_KEYS))
    if recipe.init is not None:
        settings["init"] = Path(recipe.init).name  # the card travels; where the file lay is nobody's business
    return Card(
        network=recipe.network,
        arguments=network.arguments,
        classes=source.classes,
        view=view_of(recipe),
        recipe=settings,
        versions=versions(),
        split_sha256=file_sha256(run.split),
    )


def _result(run: Run, position: Position, frozen: Frozen, source: Source, device: str, workers: int) -> TrainingResult:
    assert position.best is not None  # at least one epoch has ended
    best = Classifier.load(run.best, device)
    return TrainingResult(
        run=run,
        epochs=position.epoch,
        val_top1=float(position.best["val_top1"] or 0.0),
        seconds=position.total_seconds,
        evaluation=evaluate(best, source.side("val"), "val", workers=workers, progress=Silent()),
        rows=position.rows,
        frozen=frozen,
    )


@contextmanager
def _told(run: Run, trainee: loop.Trainee) -> Iterator[None]:
    """Say of an interruption, or of a photo gone bad, how to go on, and of full memory what would fit."""
    try:
        with batch_errors(trainee):
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
