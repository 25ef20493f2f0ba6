"""One training from DATA to a finished run folder."""

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
from bnlab.config import MACHINE_KEYS, YOURS, Recipe, Settings, read_recipe_file, to_yaml, with_changes
from bnlab.data.listing import tell_missing, write_list
from bnlab.data.loader import TrainingLoader
from bnlab.data.pixels import View, normalise
from bnlab.data.scan import tell_refused
from bnlab.data.source import Source, open_recorded_data, open_training_data
from bnlab.errors import Interrupted, PhotoError, UsageError, printable, quoted
from bnlab.files import file_sha256, read_json, remove_drafts, write_atomic, write_csv, write_json
from bnlab.machine import choose_device, environment, memory_errors, versions
from bnlab.nets import fit_to_data
from bnlab.nets.build import to_device
from bnlab.nets.freeze import Frozen
from bnlab.nets.network import TableNetwork
from bnlab.progress import Progress, Silent
from bnlab.runs import RUNS, Run, check_free, find_run, new_run
from bnlab.training import checkpoint, loop
from bnlab.training.board import tensorboard
from bnlab.training.checkpoint import Position, Row
from bnlab.training.start import adopt, check_network, load_into, new_network, without_effect


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
    settings = adopt(settings)
    recipe = settings.recipe
    device = choose_device(recipe.device)
    check_network(recipe)
    check_free(root, name)
    source = open_training_data(data, val=recipe.val, seed=recipe.seed, progress=progress)
    tell_refused(source.refused, strict=strict, progress=progress)
    tell_missing(source.photos, "val", progress)
    network, frozen = new_network(recipe, classes=len(source.classes))
    _tell_without_effect(settings, source, network, progress)
    if recipe.init is not None:
        load_into(network, source.classes, recipe.init, progress)
    run = new_run(root, name)
    with run.locked():
        write_list(run.split, source.photos)
        write_json(run.environment, environment(device))
        if source.refused:
            write_csv(run.refused, ("path", "class", "reason"), ((r.path, r.label, r.reason) for r in source.refused))
        write_atomic(run.recipe, to_yaml(settings))
        return _sit(run, recipe, network, frozen, source, device, progress)


def resume(name: str | None, *, root: Path, changes: Mapping[str, Any], progress: Progress) -> TrainingResult:
    """Go on with a run, the latest unless named, as if it had never stopped. `changes` may set what changes no result.

    Raises:
        BnlabError: there is no such run, another training has it, or its photos are gone.
        Interrupted: Ctrl-C; what a resume needs was saved.
    """
    run = find_run(root, name)
    with run.locked():
        remove_drafts(run.folder)
        recipe = with_changes(read_recipe_file(run.recipe), changes, YOURS).recipe
        device = choose_device(recipe.device)
        source = open_recorded_data(run.split)
        network, frozen = new_network(recipe, classes=len(source.classes))
        if recipe.init is not None and not run.state.exists():
            load_into(network, source.classes, recipe.init, progress)
        _tell_changes(run, device, progress)
        return _sit(run, recipe, network, frozen, source, device, progress)


def _sit(
    run: Run,
    recipe: Recipe,
    network: TableNetwork,
    frozen: Frozen,
    source: Source,
    device: str,
    progress: Progress,
) -> TrainingResult:
    """One sitting at a run whose folder is made and locked."""
    network = to_device(network, device)
    view = View(
        size=recipe.size, resize=recipe.resize, crop_fraction=recipe.crop_fraction, mean=recipe.mean, std=recipe.std
    )
    optimizer = loop.make_optimizer(network, recipe)
    position = checkpoint.load_state(run, network, optimizer, recipe)
    loader = TrainingLoader(
        source.side("train"),
        source.classes,
        size=recipe.size,
        area=recipe.crop_area,
        aspect=recipe.crop_aspect,
        flip=recipe.flip,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        workers=recipe.workers,
    )
    val = source.side("val")
    classifier = Classifier(network, _card(run, recipe, network, source, view), device)
    _tell_position(run, position, recipe, frozen, source, device, progress)
    with ExitStack() as stack:
        log = stack.enter_context(tensorboard(run, position.step))

        def judge() -> Evaluation:
            evaluation = evaluate(classifier, val, "val", workers=recipe.workers, progress=progress)
            for refusal in evaluation.refused:  # it was fine when the run began, and epochs must be judged alike
                raise PhotoError(refusal.path, refusal.reason)
            return evaluation

        def save(position: Position) -> None:
            checkpoint.save_state(run, position, network, optimizer, recipe)

        def epoch_done(position: Position, row: Row, is_best: bool) -> None:
            metrics = {"split": "val", "n": len(val), "top1": row["val_top1"], "loss": row["val_loss"]}
            card = replace(classifier.card, metrics=metrics | {"epoch": row["epoch"]})
            if is_best:
                save_classifier(run.best, network, card)
            save_classifier(run.last, network, card)
            write_csv(run.metrics, row, (r.values() for r in position.rows))
            log(row)
            progress.note(describe(row, recipe.epochs, is_best))

        stack.enter_context(_exact(device))
        stack.enter_context(_told(run, recipe))
        if not run.state.exists():
            if recipe.data_dependent and recipe.init is None:
                pixels, _ = next(loader.epoch(0))
                fit_to_data(network, normalise(torch.from_numpy(pixels).to(device), view))
            save(position)  # before any classifier is written: whatever happens then, there is a state to go on from
        hooks = loop.Hooks(judge=judge, save=save, epoch_done=epoch_done)
        loop.fit(network, optimizer, loader, recipe, view, position, hooks, device=device, progress=progress)
    return _result(run, position, frozen, source, device, recipe.workers)


def _card(run: Run, recipe: Recipe, network: TableNetwork, source: Source, view: View) -> Card:
    settings = recipe.model_dump(mode="json", exclude=set(MACHINE_KEYS))
    if recipe.init is not None:
        settings["init"] = Path(recipe.init).name  # the card travels; where the file lay is nobody's business
    return Card(
        network=recipe.network,
        arguments=network.arguments,
        classes=source.classes,
        view=view,
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
        val_top1=float(position.best["val_top1"]),
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


def how_to_resume(run: Run) -> str:
    """What to type to go on with a run, on the command line or, where it lies elsewhere than in `runs`, in Python."""
    if run.folder.parent == RUNS:
        return f"bnlab train --resume --name {quoted(run.name)}"
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
    run: Run, position: Position, recipe: Recipe, frozen: Frozen, source: Source, device: str, progress: Progress
) -> None:
    name = printable(run.folder)
    if position.epoch >= recipe.epochs or loop.out_of_patience(position, recipe):
        progress.note(f"run {name} is complete: {position.epoch} of {recipe.epochs} epochs")
        return
    sides = ", ".join(f"{len(source.side(split))} {split}" for split in ("train", "val"))
    doing = f"resuming {name} at step {position.step}" if position.step else f"training {name}"
    progress.note(f"{doing}: {recipe.network}, {len(source.classes)} classes, {sides}, {recipe.size} px, on {device}")
    if str(frozen):
        progress.note(f"frozen: {frozen}")


def _tell_without_effect(settings: Settings, source: Source, network: TableNetwork, progress: Progress) -> None:
    for sentence in without_effect(settings, network):
        progress.warn(sentence)
    if "val" in settings.own and source.own_val:
        progress.warn("val has no effect: these photos have a val side of their own")


def _tell_changes(run: Run, device: str, progress: Progress) -> None:
    """Warn where the run will not end in the same bits, for it goes on elsewhere than it began."""
    began, now = read_json(run.environment), environment(device)
    for key in ("device", "gpu", "threads", "processor", "versions"):
        if began.get(key) != now[key]:
            progress.warn(f"this run began with other {key}, so it does not go on bit for bit")
