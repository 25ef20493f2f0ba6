"""One training from DATA to a finished run folder."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bnlab.classifier.card import Card
from bnlab.classifier.evaluate import Evaluation, evaluate
from bnlab.classifier.file import save_classifier
from bnlab.classifier.predict import Classifier
from bnlab.config import YOURS, Settings, read_recipe_file, to_yaml, with_changes
from bnlab.data.listing import tell_missing, write_list
from bnlab.data.pixels import normalise
from bnlab.data.scan import tell_refused
from bnlab.data.source import Source, open_recorded_data, open_training_data
from bnlab.errors import Interrupted, PhotoError, UsageError
from bnlab.files import file_sha256, remove_drafts, write_atomic, write_csv, write_json
from bnlab.machine import choose_device, environment, fast_precision, memory_errors, versions
from bnlab.nets import fit_to_data
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
from bnlab.training.judge import Judge, Judgement
from bnlab.training.schedule import Plan
from bnlab.training.start import adopt, check_network, load_into, new_network
from bnlab.training.tell import describe, how_to_resume, tell_changes, tell_position, tell_without_effect
from bnlab.training.trainee import make_caches, make_trainee, view_of


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
    settings = adopt(settings)
    device = choose_device(settings.recipe.device)
    if settings.recipe.precision == "auto":
        settings = with_changes(settings, {"precision": fast_precision(device)}, "machine")
    recipe = settings.recipe
    check_network(recipe)
    check_free(root, name)
    source = open_training_data(data, val=recipe.val, seed=recipe.seed, progress=progress)
    tell_refused(source.refused, strict=strict, progress=progress)
    tell_missing(source.photos, "val", progress)
    network, frozen = new_network(recipe, classes=len(source.classes))
    tell_without_effect(settings, source, network, progress)
    if recipe.init is not None:
        load_into(network, source.classes, recipe.init, progress)
    run = new_run(root, name)
    with run.locked():
        write_list(run.split, source.photos)
        write_json(run.environment, environment(device))
        if source.refused:
            write_csv(run.refused, ("path", "class", "reason"), ((r.path, r.label, r.reason) for r in source.refused))
        write_atomic(run.recipe, to_yaml(settings))
        return _sit(run, settings, network, frozen, source, device, progress, began)


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
        return _sit(run, settings, network, frozen, source, device, progress, began)


def _sit(
    run: Run,
    settings: Settings,
    network: TableNetwork,
    frozen: Frozen,
    source: Source,
    device: str,
    progress: Progress,
    began: float,
) -> TrainingResult:
    """One sitting, that began at a time.monotonic(), at a run whose folder is made and locked."""
    recipe = settings.recipe
    network = to_device(network, device)
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
    position = checkpoint.load_state(run, network, trainee.optimizer, recipe, trainee.average)
    budget = Budget(began - position.total_seconds, recipe.time) if recipe.time else None
    tell_position(run, position, recipe, frozen, source, device, progress)
    with ExitStack() as stack:
        stack.enter_context(_exact(device))
        stack.enter_context(_told(run, recipe))

        def judged() -> Judgement:
            return judge(trainee.average.network if trainee.average else network, progress)

        def save(position: Position) -> None:
            checkpoint.save_state(run, position, network, trainee.optimizer, recipe, trainee.average)

        def epoch_done(position: Position, row: Row, is_best: bool) -> None:
            if row["val_top1"] is not None:
                metrics = {"split": "val", "n": len(judge.val), "top1": row["val_top1"], "loss": row["val_loss"]}
                card = replace(_card(run, recipe, network, source), metrics=metrics | {"epoch": row["epoch"]})
                if is_best:
                    save_classifier(run.best, judge.network, card)
                save_classifier(run.last, judge.network, card)
            write_csv(run.metrics, row, (r.values() for r in position.rows))
            log(row)
            progress.note(describe(row, position.plan.epochs, is_best))

        def replan(position: Position) -> None:
            if budget:
                position.plan = budget.replanned(position, recipe, progress)

        if not run.state.exists():
            if recipe.data_dependent and recipe.init is None:
                pixels, _ = next(trainee.loader.epoch(0, recipe.size))
                fit_to_data(network, normalise(torch.from_numpy(pixels).to(device), view_of(recipe)))
            if budget and not recipe.steps:
                recipe = budget.planned(trainee, lambda: judge(network, Silent()), progress)
                changed = {"steps": recipe.steps, "judge_every": recipe.judge_every}
                write_atomic(run.recipe, to_yaml(with_changes(settings, changed, "time")))
                trainee = replace(trainee, recipe=recipe)
            position.plan = Plan.of(recipe, trainee.loader.batches)
            save(position)  # before any classifier is written: whatever happens then, there is a state to go on from
        log = stack.enter_context(tensorboard(run, position.step))
        hooks = loop.Hooks(judge=judged, save=save, epoch_done=epoch_done, replan=replan)
        loop.fit(trainee, position, hooks, progress=progress)
    return _result(run, position, frozen, source, device, recipe.workers)


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
def _told(run: Run, recipe: Recipe) -> Iterator[None]:
    """Say of an interruption, or of a photo gone bad, how to go on, and of full memory what would fit."""
    try:
        with memory_errors(recipe.batch_size, recipe.size):
            yield
    except PhotoError as error:
        raise PhotoError(
            error.path, error.reason, f"put it back as it was, and go on with: {how_to_resume(run)}"
        ) from None
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):  # torch's words, and those of bnlab.norm
            raise
        raise UsageError(
            f"a part of a batch has nothing to normalise by ({str(error).splitlines()[0]})",
            "take a larger batch_size, size or ghost batch",
        ) from None
    except Interrupted as interruption:
        raise Interrupted(f"{interruption.message}, and saved; go on with: {how_to_resume(run)}") from None


@contextmanager
def _exact(device: str) -> Iterator[None]:
    """The same steps give the same weights, and torch is left as it was: its generators and its choice of kernels."""
    cuda = [torch.cuda.current_device()] if device == "cuda" else []
    with (
        torch.random.fork_rng(devices=cuda),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True),
    ):
        yield
