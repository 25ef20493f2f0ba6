"""What a training says of itself on the way."""

from bnlab.config import Settings
from bnlab.data.dataset import Dataset
from bnlab.errors import printable, quoted
from bnlab.files import read_json
from bnlab.machine import environment
from bnlab.nets.freeze import Frozen
from bnlab.nets.network import TableNetwork
from bnlab.progress import Progress
from bnlab.recipe import Recipe
from bnlab.runs import RUNS, Run
from bnlab.training import loop
from bnlab.training.checkpoint import Row, TrainState
from bnlab.training.finetune import without_effect


def how_to_resume(run: Run) -> str:
    """What to type to go on with a run, on the command line or, where it lies elsewhere than in `runs`, in Python."""
    if run.folder.parent == RUNS:
        return f"bnlab train --resume --name {quoted(run.name)}"
    return f"bnlab.resume({run.name!r}, runs={str(run.folder.parent)!r})"


def describe(row: Row, epochs: int, is_best: bool) -> str:
    """An epoch in one line."""
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


def report_start(
    run: Run, state: TrainState, recipe: Recipe, frozen: Frozen, dataset: Dataset, device: str, progress: Progress
) -> None:
    """Say what is about to be trained, or that nothing is."""
    name = printable(run.folder)
    plan = state.plan
    if plan.steps and (state.epoch >= plan.epochs or loop.out_of_patience(state, recipe)):
        progress.note(f"run {name} is complete: {state.epoch} of {plan.epochs} epochs")
        return
    sides = ", ".join(f"{len(dataset.in_split(split))} {split}" for split in ("train", "val"))
    doing = f"resuming {name} at step {state.step}" if state.step else f"training {name}"
    progress.note(
        f"{doing}: {recipe.network}, {len(dataset.classes)} classes, {sides}, {recipe.size} px, "
        f"on {device} in {recipe.precision}"
    )
    if str(frozen):
        progress.note(f"frozen: {frozen}")


def warn_without_effect(settings: Settings, dataset: Dataset, network: TableNetwork, progress: Progress) -> None:
    """Warn of the user's own keys that change nothing."""
    for sentence in without_effect(settings, network):
        progress.warn(sentence)
    if "val" in settings.own and dataset.own_val:
        progress.warn("val has no effect: these photos have a val side of their own")


def warn_changed_machine(run: Run, device: str, progress: Progress) -> None:
    """Warn where the run will not end in the same bits, for it goes on elsewhere than it began."""
    began, now = read_json(run.environment), environment(device)
    for key in ("device", "gpu", "threads", "processor", "versions"):
        if began.get(key) != now[key]:
            progress.warn(f"this run began with other {key}, so it does not go on bit for bit")
