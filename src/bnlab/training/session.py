"""One training from DATA to a finished run folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bnlab.classifier.card import Card
from bnlab.classifier.evaluate import Evaluation, evaluate
from bnlab.classifier.file import save_classifier
from bnlab.classifier.predict import Classifier
from bnlab.config import MACHINE_KEYS, Recipe, Settings, read_recipe_file, to_yaml
from bnlab.data.listing import tell_missing, write_list
from bnlab.data.loader import TrainingLoader
from bnlab.data.pixels import View
from bnlab.data.scan import tell_refused
from bnlab.data.source import Source, open_recorded_data, open_training_data
from bnlab.errors import Interrupted
from bnlab.files import write_atomic, write_csv, write_json
from bnlab.machine import choose_device, environment, usable_cores, versions
from bnlab.nets import build
from bnlab.nets.build import to_device
from bnlab.progress import Progress, Silent
from bnlab.runs import RUNS, Run, find_run, new_run
from bnlab.training import checkpoint, loop
from bnlab.training.board import tensorboard
from bnlab.training.checkpoint import Position, Row
from bnlab.training.start import adopt, load_into


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

    def to_json(self) -> dict[str, Any]:
        """The document of `bnlab train --json`."""
        return {
            "run": str(self.run.folder),
            "best": str(self.run.best),
            "epochs": self.epochs,
            "val_top1": self.val_top1,
            "seconds": self.seconds,
        }


def train(
    data: Path, settings: Settings, *, root: Path, name: str | None, strict: bool, progress: Progress
) -> TrainingResult:
    """Train a new run on DATA.

    Raises:
        BnlabError: DATA, the recipe or the name cannot be used; the training diverged; the disk is full.
        Interrupted: Ctrl-C; what a resume needs was saved.
    """
    settings = adopt(settings)
    recipe = settings.recipe
    device = choose_device(recipe.device)
    build(recipe.network, classes=2)  # refuses an unknown name before an hour of reading photos
    source = open_training_data(data, val=recipe.val, seed=recipe.seed, progress=progress)
    tell_refused(source.refused, strict=strict, progress=progress)
    tell_missing(source.photos, "val", progress)
    run = new_run(root, name)
    with run.locked():
        write_list(run.split, source.photos)
        write_json(run.environment, environment(device))
        write_atomic(run.recipe, to_yaml(settings))
        return _sit(run, recipe, source, device, progress)


def resume(name: str | None, *, root: Path, changes: Mapping[str, Any], progress: Progress) -> TrainingResult:
    """Go on with a run, the latest unless named, as if it had never stopped. `changes` may set what changes no result.

    Raises:
        BnlabError: there is no such run, another training has it, or its photos are gone.
        Interrupted: Ctrl-C; what a resume needs was saved.
    """
    run = find_run(root, name)
    with run.locked():
        recipe = read_recipe_file(run.recipe)
        recipe = Recipe.model_validate(recipe.model_dump() | dict(changes))
        device = choose_device(recipe.device)
        source = open_recorded_data(run.split)
        return _sit(run, recipe, source, device, progress)


def _sit(run: Run, recipe: Recipe, source: Source, device: str, progress: Progress) -> TrainingResult:
    """One sitting at a run whose folder is made and locked."""
    view = View(
        size=recipe.size, resize=recipe.resize, crop_fraction=recipe.crop_fraction, mean=recipe.mean, std=recipe.std
    )
    arguments = {"dropout": recipe.dropout}
    network = build(
        recipe.network, classes=len(source.classes), auxiliary=recipe.auxiliary, seed=recipe.seed, **arguments
    )
    if recipe.init is not None and not run.state.exists():
        load_into(network, source.classes, recipe.init, progress)
    network = to_device(network, device)
    optimizer = loop.make_optimizer(network, recipe)
    position = checkpoint.load_state(run.state, network, optimizer, recipe, device)
    workers = usable_cores() if recipe.workers < 0 else recipe.workers
    loader = TrainingLoader(
        source.side("train"),
        source.classes,
        size=recipe.size,
        area=recipe.crop_area,
        aspect=recipe.crop_aspect,
        flip=recipe.flip,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        workers=workers,
    )
    card = Card(
        network=recipe.network,
        arguments=arguments,
        classes=source.classes,
        view=view,
        recipe=recipe.model_dump(mode="json", exclude=set(MACHINE_KEYS)),
        versions=versions(),
    )
    val = source.side("val")
    _tell_position(run, position, recipe, source, device, progress)
    with tensorboard(run, position.step) as log:

        def judge() -> Evaluation:
            classifier = Classifier(network, card, device)
            return evaluate(classifier, val, "val", workers=workers, progress=progress)

        def save(position: Position) -> None:
            checkpoint.save_state(run.state, position, network, optimizer, recipe)

        def epoch_done(position: Position, row: Row, is_best: bool) -> None:
            done = _with_metrics(card, row, len(val))
            if is_best:
                save_classifier(run.best, network, done)
            save_classifier(run.last, network, done)
            write_csv(run.metrics, row, (r.values() for r in position.rows))
            log(row)
            progress.note(describe(row, recipe.epochs, is_best))

        _reproducible(device)
        try:
            with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []):
                loop.fit(
                    network,
                    optimizer,
                    loader,
                    recipe,
                    view,
                    position,
                    loop.Hooks(judge=judge, save=save, epoch_done=epoch_done),
                    device=device,
                    progress=progress,
                )
        except Interrupted as interruption:
            raise Interrupted(f"{interruption.message}, and saved; go on with: {how_to_resume(run)}") from None
    return _result(run, position, source, device, workers)


def _result(run: Run, position: Position, source: Source, device: str, workers: int) -> TrainingResult:
    assert position.best is not None  # at least one epoch has ended
    evaluation = evaluate(
        Classifier.load(run.best, device), source.side("val"), "val", workers=workers, progress=Silent()
    )
    return TrainingResult(
        run=run,
        epochs=position.epoch,
        val_top1=float(position.best["val_top1"]),
        seconds=position.total_seconds,
        evaluation=evaluation,
        rows=position.rows,
    )


def how_to_resume(run: Run) -> str:
    """What to type to go on with a run, on the command line or, where it lies elsewhere than in `runs`, in Python."""
    if run.folder.parent == RUNS:
        return f"bnlab train --resume --name {run.name}"
    return f"bnlab.resume({run.name!r}, runs={str(run.folder.parent)!r})"


def describe(row: Row, epochs: int, is_best: bool) -> str:
    """An epoch in one line."""
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  "
        f"loss {row['train_loss']:.3f}  train {row['train_top1']:.1%}  "
        f"val {row['val_top1']:.1%} (loss {row['val_loss']:.3f})  {row['images_per_second']:.0f} images/s"
        + ("  best so far" if is_best else "")
    )


def _tell_position(
    run: Run, position: Position, recipe: Recipe, source: Source, device: str, progress: Progress
) -> None:
    if position.epoch >= recipe.epochs or loop.out_of_patience(position, recipe):
        progress.note(f"run {run.folder} is complete: {position.epoch} of {recipe.epochs} epochs")
        return
    sides = ", ".join(f"{len(source.side(split))} {split}" for split in ("train", "val"))
    doing = f"resuming {run.folder} at step {position.step}" if position.step else f"training {run.folder}"
    progress.note(f"{doing}: {recipe.network}, {len(source.classes)} classes, {sides}, {recipe.size} px, on {device}")


def _with_metrics(card: Card, row: Row, n: int) -> Card:
    metrics = {"split": "val", "n": n, "top1": row["val_top1"], "loss": row["val_loss"], "epoch": row["epoch"]}
    return Card(**{**vars(card), "metrics": metrics})


def _reproducible(device: str) -> None:
    """The same steps give the same weights: on a GPU that has to be asked for."""
    if device == "cuda":
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
