"""Trains a run for more epochs or steps than it was begun with, where its schedule does not depend on their number."""

from bnlab.errors import RunError, printable, quoted
from bnlab.recipe import Recipe
from bnlab.runs import Run
from bnlab.training.schedule import Plan
from bnlab.training.state import TrainState, out_of_patience, validated_epochs


def extend(run: Run, state: TrainState, before: Recipe, recipe: Recipe) -> None:
    """Give the state of a run the plan of a recipe with other `epochs` or `steps`.

    The size of the photos goes on from where it is: a finished run is at its full size and stays there. If patience
    had ended the run, it counts anew from here.

    Raises:
        RunError: the run has trained as long already, or its schedule ends with its plan.
    """
    name, plan = f"run {printable(run.folder)}", state.plan
    wanted = Plan.of(recipe, plan.batches)
    if before.time is not None or before.plan:
        same = f" --time {before.time:.0f}s" if before.time else ""
        has_ended = state.step == plan.steps or out_of_patience(state, recipe)
        raise RunError(
            f"the length and the schedule of {name} follow from a given time",
            f"{_new_run(run)}{same}" if has_ended else "leave epochs and steps out",
        )
    if recipe.steps and recipe.steps == before.steps and recipe.epochs != before.epochs:
        raise RunError(f"{name} counts steps, not epochs", "pass --set steps=NUMBER")
    if wanted.steps <= state.step:
        done = f"{state.step} steps" if recipe.steps else f"{state.step / plan.batches:.4g} epochs"
        raise RunError(f"{name} has trained {done} already", "pass a larger number")
    if wanted.steps != plan.steps and recipe.schedule == "one-cycle":
        more = f"--epochs {max(1, recipe.epochs - state.epoch)}"
        if recipe.steps:
            more = f"--set steps={wanted.steps - state.step}"
        raise RunError(
            f"{name} has the schedule one-cycle, whose learning rate ends at 0 after {_length(before, plan)}",
            f"{_new_run(run)} {more}" if state.step == plan.steps else "leave epochs and steps out, or begin a new run",
        )
    if out_of_patience(state, recipe):
        state.patience_from = validated_epochs(state)[-1]
    if wanted.steps == plan.steps:
        return
    if not state.batch and state.step < state.epoch * plan.batches:  # the last epoch ended early; its row stays
        state.epoch -= 1
        state.batch = state.step - state.epoch * plan.batches
    state.plan = plan.changed(state.step, wanted.steps, wanted.every)


def _new_run(run: Run) -> str:
    return f"begin a new run from its weights: bnlab train DATA --init {quoted(run.last)}"


def _length(recipe: Recipe, plan: Plan) -> str:
    return f"{recipe.steps} steps" if recipe.steps else f"{plan.epochs} epochs"
