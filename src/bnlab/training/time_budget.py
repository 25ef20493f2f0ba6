"""Training for a wall-clock time: how many steps fit into it, by the speed that was measured here."""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from bnlab.data.preprocess import Pixels
from bnlab.errors import UsageError
from bnlab.progress import Progress
from bnlab.recipe import Recipe
from bnlab.training.build import scratch_copy
from bnlab.training.checkpoint import TrainState
from bnlab.training.loop import TrainingContext, train_step
from bnlab.training.schedule import Plan, StepTimes

_MARGIN = 0.03  # share of the time that is left unplanned
_JUDGING = 0.06  # the largest share of the time that is spent on judging
_TRIALS = 6  # steps at each size, to measure
_WINDOW, _SHARE = 20, 0.02  # steps, and share of the time, between two looks at the least
_LATE = 1.04  # a plan is changed when what is left of it takes longer than is left by this, or less
_BELIEVED = 0.2  # share of the time before which no speed is believed: photos are read for the first time, and the like


class TimeBudget:
    """Keeps a training within `seconds` of `began`, by time.monotonic."""

    def __init__(self, began: float, seconds: float) -> None:
        self.seconds, self.end = seconds, began + seconds
        self._seen = (0, 0.0, 0.0)  # steps, seconds of training, and planned ones, at the last look
        self._slowness: float | None = None  # found there

    def planned(
        self, context: TrainingContext, judge: Callable[[], object], progress: Progress
    ) -> tuple[Recipe, StepTimes]:
        """The recipe with the steps that fit and with how often to judge, and the pace this was planned by.

        A copy of the network does a few steps at each size it will see, and the network is judged twice: the first time
        its photos are read.

        Raises:
            UsageError: not even one step fits.
        """
        recipe, batches = context.recipe, context.loader.batches
        first, validation = (_seconds_of(judge) for _ in range(2))
        step_times = StepTimes(steps=_seconds_of_steps(context), validation=validation, last=first + 1.0)
        left = (self.end - time.monotonic() - step_times.last) * (1 - _MARGIN)
        every, steps = recipe.validate_every, _steps_in(left - validation, recipe, batches, step_times)
        if not every:  # as often as _JUDGING allows, and ten times at most
            epochs = max(1, -(-steps // batches))
            every = -(-epochs // max(1, min(10, int(_JUDGING * left / validation))))
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
            f"judgement {validation:.1f} s; the same once more: --set steps={steps} --set judge_every={every}"
        )
        return recipe, step_times

    def replanned(self, state: TrainState, recipe: Recipe, progress: Progress) -> Plan:
        """The plan, shorter where at the speed of late it would end late, and back where that has passed.

        A plan is never longer than at first, so that a machine that is not disturbed gives the same training again.
        """
        plan, step_times = state.plan, state.step_times
        step, seconds, planned_then = self._seen
        if state.step - step < _WINDOW or state.training_seconds - seconds < _SHARE * self.seconds:
            return plan
        self._seen = (state.step, state.training_seconds, state.planned_seconds)
        left = self.end - time.monotonic() - step_times.last
        planned = state.planned_seconds - planned_then
        if not planned or left > (1 - _BELIEVED) * self.seconds or state.step >= plan.steps:
            return plan
        slowness = (state.training_seconds - seconds) / planned
        slowness, self._slowness = (slowness + (self._slowness or slowness)) / 2, slowness
        validation = step_times.validation * sum(
            plan.validates(recipe, epoch) for epoch in range(state.epoch, plan.epochs)
        )
        left = max(0.0, left - validation * max(1.0, slowness))
        rest = plan.steps - state.step
        running = state.size if state.batch else 0
        needed = slowness * step_times.seconds(plan, recipe, state.epoch, state.step, running)
        fit = left / needed  # times the rest
        if 1 / _LATE <= fit <= _LATE:
            return plan
        steps = min(plan.wanted or plan.steps, state.step + max(1, int(rest * fit)))
        if steps == plan.steps:
            return plan
        faster = "faster again" if steps > plan.steps else "slower than planned"
        progress.warn(f"{faster}: {steps} steps in place of {plan.steps}, to end on time")
        return plan.changed(state.step, steps)


def _steps_in(seconds: float, recipe: Recipe, batches: int, step_times: StepTimes) -> int:
    """The most steps that take no longer."""
    steps, too_many = 0, 1 + int(max(seconds, 0.0) / min(step_times.steps.values()))
    while too_many - steps > 1:
        middle = (steps + too_many) // 2
        fits = step_times.seconds(Plan(steps=middle, batches=batches), recipe) <= seconds
        steps, too_many = (middle, too_many) if fits else (steps, middle)
    return steps


def _seconds_of(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _seconds_of_steps(context: TrainingContext) -> dict[int, float]:
    """Of one step at each size that may be seen, with its batch, by a copy that is then thrown away."""
    recipe, plan = context.recipe, Plan(steps=1000, batches=1)
    one = scratch_copy(context)
    seconds = {}
    for size in sorted({plan.size(recipe, epoch) for epoch in range(1000)}):
        batches = chain.from_iterable(context.loader.epoch(0, size) for _ in range(_TRIALS))
        times = [_seconds_of(partial(_step_on, one, batches)) for _ in range(_TRIALS)]
        seconds[size] = statistics.median(times[1:])  # the first finds its memory
    return seconds


def _step_on(context: TrainingContext, batches: Iterator[tuple[Pixels, NDArray[np.int64]]]) -> None:
    train_step(context, *next(batches), 0)
