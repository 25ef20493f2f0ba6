"""A wall-clock budget for a training: how many steps fit into it, from the speed measured on this machine."""

import statistics
import time
from bisect import bisect
from collections.abc import Callable, Iterable
from itertools import chain, islice, pairwise

from bnlab.errors import UsageError
from bnlab.progress import Progress
from bnlab.recipe import Recipe
from bnlab.training.build import TrainingContext, scratch_copy
from bnlab.training.loop import train_step
from bnlab.training.schedule import Plan, StepTimes
from bnlab.training.state import TrainState

# Fractions are of the budget.
_MARGIN = 0.03  # fraction that is left unplanned
_VALIDATION = 0.06  # largest fraction spent on validation
_TRIALS = 6  # measured steps at each size
_MIN_STEPS, _MIN_FRACTION = 20, 0.02  # least steps and fraction between two changes of the plan
_TOLERANCE = 1.04  # the plan is changed if the remaining steps take longer or shorter than the time left by this factor
_UNSETTLED = 0.2  # fraction at the beginning in which the plan stays: photos are read for the first time


class TimeBudget:
    """Ends a training within `seconds` of `began`, a time.monotonic()."""

    def __init__(self, began: float, seconds: float) -> None:
        self.seconds, self.end = seconds, began + seconds
        self._last = (0, 0.0, 0.0)  # steps, seconds of training, and planned seconds at the last measurement
        self._slowness: float | None = None  # measured then

    def planned(
        self, context: TrainingContext, validate: Callable[[], object], progress: Progress
    ) -> tuple[Recipe, StepTimes]:
        """The recipe with the steps that fit and how often to validate, and the times from which this was planned.

        A copy of the network makes a few steps at each size. The network is validated twice: the first validation also
        reads the photos.

        Raises:
            UsageError: not even one step fits.
        """
        recipe, batches = context.recipe, context.loader.batches
        first, validation = _durations(validate() for _ in range(2))
        step_times = StepTimes(steps=_seconds_of_steps(context), validation=validation, last=first + 1.0)
        left = (self.end - time.monotonic() - step_times.last) * (1 - _MARGIN)
        every, steps = recipe.validate_every, _steps_in(left - validation, recipe, batches, step_times)
        if not every:  # as often as _VALIDATION allows, and ten times at most
            epochs = max(1, -(-steps // batches))
            every = -(-epochs // max(1, min(10, int(_VALIDATION * left / validation))))
            steps = _steps_in(left - validation * -(-epochs // every), recipe, batches, step_times)
        if steps < 1:
            raise UsageError(
                f"not one step fits into {recipe.time:.0f} s: one takes {max(step_times.steps.values()):.2f} s, and "
                f"what goes before and after {(recipe.time or 0) - left:.0f} s",
                "give more --time, or a smaller --size",
            )
        mean = step_times.seconds(Plan(steps=steps, batches=batches), recipe) / steps
        recipe = recipe.model_copy(update={"steps": steps, "validate_every": every})
        progress.note(
            f"{steps} steps ({steps / batches:.1f} epochs) fit into the time: one takes {mean:.3f} s on average, a "
            f"validation {validation:.1f} s; to repeat this training: --set steps={steps} --set validate_every={every}"
        )
        return recipe, step_times

    def replanned(self, state: TrainState, recipe: Recipe, progress: Progress) -> Plan:
        """The plan, shortened if it would end late at the recent speed, and lengthened again if that has passed.

        It is never longer than the first plan, so that an undisturbed machine repeats the same training.
        """
        plan, step_times = state.plan, state.step_times
        step, seconds, planned_then = self._last
        if state.step - step < _MIN_STEPS or state.training_seconds - seconds < _MIN_FRACTION * self.seconds:
            return plan
        self._last = (state.step, state.training_seconds, state.planned_seconds)
        left = self.end - time.monotonic() - step_times.last
        planned = state.planned_seconds - planned_then
        if not planned or left > (1 - _UNSETTLED) * self.seconds or state.step >= plan.steps:
            return plan
        slowness = (state.training_seconds - seconds) / planned
        slowness, self._slowness = (slowness + (self._slowness or slowness)) / 2, slowness
        validations = sum(plan.validates(recipe, epoch) for epoch in range(state.epoch, plan.epochs))
        left = max(0.0, left - step_times.validation * validations * max(1.0, slowness))
        running = state.size if state.batch else 0
        needed = slowness * step_times.seconds(plan, recipe, state.epoch, state.step, running)
        stretch = left / needed  # times the remaining steps
        if 1 / _TOLERANCE <= stretch <= _TOLERANCE:
            return plan
        steps = min(plan.wanted or plan.steps, state.step + max(1, int((plan.steps - state.step) * stretch)))
        if steps == plan.steps:
            return plan
        faster = "faster again" if steps > plan.steps else "slower than planned"
        progress.warn(f"{faster}: {steps} steps in place of {plan.steps}, to end on time")
        return plan.changed(state.step, steps)


def _steps_in(seconds: float, recipe: Recipe, batches: int, step_times: StepTimes) -> int:
    """The largest number of steps that take at most so long."""
    most = int(max(seconds, 0.0) / min(step_times.steps.values()))
    plans = range(1, most + 1)
    return bisect(plans, seconds, key=lambda steps: step_times.seconds(Plan(steps=steps, batches=batches), recipe))


def _durations(works: Iterable[object]) -> list[float]:
    """Seconds from the request for each item to its arrival; `works` is lazy, so this is the time of making it."""
    ends = [time.monotonic(), *(time.monotonic() for _ in works)]
    return [end - start for start, end in pairwise(ends)]


def _seconds_of_steps(context: TrainingContext) -> dict[int, float]:
    """Seconds of a step, by size, for each size that the training will have, measured on a copy."""
    recipe, plan = context.recipe, Plan(steps=1000, batches=1)
    scratch = scratch_copy(context)
    seconds = {}
    for size in sorted({plan.size(recipe, epoch) for epoch in range(1000)}):
        batches = chain.from_iterable(context.loader.epoch(0, size) for _ in range(_TRIALS))
        steps = (train_step(scratch, *batch, 0) for batch in islice(batches, _TRIALS))
        times = _durations(steps)  # with the wait for photos
        seconds[size] = statistics.median(times[1:])  # the first step also allocates its memory
    return seconds
