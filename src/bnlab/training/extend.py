"""Trains a run for more epochs or steps than it was begun with, where its schedule does not depend on their number."""

from bnlab.errors import RunError, plural, printable, quoted
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
        same: dict[str, object] = {"time": f"{before.time:.0f}s"} if before.time else {}
        has_ended = state.step == plan.steps or out_of_patience(state, recipe)
        raise RunError(
            f"the length and the schedule of {name} follow from a given time",
            new_run_from(run, **same) if has_ended else "leave epochs and steps out",
        )
    if recipe.steps and recipe.steps == before.steps and recipe.epochs != before.epochs:
        raise RunError(f"{name} counts steps, not epochs", "pass steps=NUMBER")
    if wanted.steps <= state.step:
        epochs = state.step / plan.batches
        done = plural(state.step, "step") if recipe.steps else f"{epochs:.4g} epoch{'s' * (epochs != 1)}"
        raise RunError(f"{name} has trained {done} already", "pass a larger number")
    if wanted.steps != plan.steps and recipe.schedule == "one-cycle":
        more: dict[str, object] = {"epochs": max(1, recipe.epochs - state.epoch)}
        if recipe.steps:
            more = {"set": f"steps={wanted.steps - state.step}"}
        raise RunError(
            f"{name} has the schedule one-cycle, whose learning rate ends at 0 after {_length(before, plan)}",
            new_run_from(run, **more) if state.step == plan.steps else "leave epochs and steps out, or begin a new run",
        )
    if out_of_patience(state, recipe):
        state.patience_from = validated_epochs(state)[-1]
    if wanted.steps == plan.steps:
        return
    if not state.batch and state.step < state.epoch * plan.batches:  # the last epoch ended early; its row stays
        state.epoch -= 1
        state.batch = state.step - state.epoch * plan.batches
    state.plan = plan.changed(state.step, wanted.steps, wanted.every)


def new_run_from(run: Run, **options: object) -> str:
    """The remedy where a run does not go on: a new one from its weights, with these options of the command line."""
    more = "".join(f" --{key} {value}" for key, value in options.items())
    return f"begin a new run from its weights: bnlab train DATA --init {quoted(run.last)}{more}"


def _length(recipe: Recipe, plan: Plan) -> str:
    return plural(recipe.steps, "step") if recipe.steps else plural(plan.epochs, "epoch")
