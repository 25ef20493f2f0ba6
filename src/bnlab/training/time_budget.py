"""A wall-clock budget for a training: how many steps fit into it, from the speed measured on this machine.

A first plan follows from a few steps and validations. During the training, `TimeBudget.replanned` compares the time
that the rest of the plan takes at the recent speed with the time left, and makes the plan shorter or longer if they
differ.
"""

import math
import time
from bisect import bisect
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain, islice, pairwise
from statistics import median

import torch

from bnlab.errors import UsageError, plural
from bnlab.progress import Progress
from bnlab.recipe import Recipe
from bnlab.training.build import TrainingContext, scratch_copy
from bnlab.training.loop import train_step
from bnlab.training.schedule import Plan, StepTimes
from bnlab.training.state import TrainState
from bnlab.training.validate import ValidationResult

_EXIT = 1.2  # seconds for files after the last step, the result on the screen and the end of the process
# Fractions are of the budget, without these seconds.
_AIM, _LATEST = 0.975, 0.99  # when the training is to end; long steps may end it before or after _AIM, up to _LATEST
_VALIDATION = 0.06  # largest fraction spent on validation, unless the recipe says how often to validate
_UNUSED = 0.01  # the validation before the last one is left out if more time would remain unused because of it
_PRIOR = 0.05  # weight of the measurement before the training, in the average that the training goes on with
_TRIALS = 4  # measured steps at each size
# Fractions of the time left.
_TOLERANCE = 0.04  # a plan that ends early or late by less is kept
_PAUSE = 0.02  # between two comparisons
_MEMORY = 0.5  # over which the speed is averaged
_OUTLIER = 4.0  # a single stretch that is slower than the average by this factor counts as slower by no more than it
_ANNOUNCED = 1.25  # a change of the steps by this factor is reported
_ONLY_LAST = 1_000_000  # epochs between validations, if only the last one is validated


class TimeBudget:
    """Ends a training within `seconds` of `began`, a time.monotonic()."""

    def __init__(self, began: float, seconds: float, device: str) -> None:
        self.began, self.seconds, self.device = began, seconds - min(_EXIT, 0.1 * seconds), device
        self._measured = (_PRIOR * seconds, _PRIOR * seconds)  # recent seconds of steps, and those planned for them
        self._ratio = 1.0  # of these, in the latest stretch
        self._last_validation = 0.0  # seconds of the latest validation, on a machine as fast as when it was measured
        self._last_step = -1  # the step before which `replanned` was called last
        self._reads = range(0)  # steps whose photos are read for the first time
        self._mark = self._next = 0.0  # when the current stretch began, and when it may end
        self._work = self._validating = 0.0  # planned seconds of the steps in this stretch; seconds of its validations
        self._announced = 0  # steps

    def planned(
        self,
        context: TrainingContext,
        validate: Callable[[], ValidationResult],
        report: Callable[[ValidationResult], object],
        progress: Progress,
    ) -> tuple[Plan, StepTimes]:
        """The plan that fits into the budget, and the times from which it follows.

        A copy of the network makes a few steps. The network is validated and reported on twice: the first time also
        reads the photos and imports what draws.

        Raises:
            UsageError: not even one step fits.
        """
        recipe, batches = context.recipe, context.loader.batches
        validate()
        began, result, ended = time.monotonic(), validate(), time.monotonic()
        validation = ended - began
        evaluation = (validation - result.seconds) / (2 if result.running else 1)
        _, reporting = _durations(report(result) for _ in range(2))
        steps, reading = _seconds_of_steps(context)
        times = StepTimes(steps=steps, reading=reading, validation=validation, last=evaluation + reporting)
        self._reads = range(_TRIALS, batches)
        left = self._left(times, recipe)
        plan = self._fitting(Plan(steps=1, batches=batches), recipe, times, left)
        one, before = times.of_step(recipe.size), time.monotonic() - self.began
        if times.seconds(plan, recipe) > self.seconds - before:
            raise UsageError(
                f"not one step fits into {self.seconds:.0f} s: one takes {one:.2f} s, and what goes before and after "
                f"{before + times.validation + times.last:.0f} s",
                "give more time, or a smaller size",
            )
        self._announced = plan.steps
        wanted = recipe.validate_every
        if wanted and replace(plan, every=wanted).validations(0) > plan.validations(0):
            progress.warn(_left_out(wanted))
        progress.note(
            f"the time is enough for {plural(plan.steps, 'step')} ({plan.steps / batches:.1f} epochs): one takes "
            f"{one:.3f} s at {recipe.size} px, a validation {validation:.1f} s"
        )
        return plan, times

    def replanned(self, state: TrainState, recipe: Recipe, progress: Progress) -> Plan:
        """The plan from this step on, which ends on time at the recent speed; it has this step at least.

        It updates the speed in `state.step_times`.
        """
        now, plan = time.monotonic(), state.plan
        if self._last_step < 0:
            self._begin(state, now)
        elif state.step > self._last_step:
            times = state.step_times
            self._work += times.of_step(state.size) + (times.reading if state.step - 1 in self._reads else 0.0)
        self._last_step = state.step
        if now < self._next:
            return plan
        _synchronise(self.device)
        now = time.monotonic()
        if self._work:
            slowness = self._slowness(now - self._mark - self._validating, self.began + self.seconds - now)
            state.step_times = replace(state.step_times, slowness=slowness)
            self._mark, self._work, self._validating = now, 0.0, 0.0
        self._next = now + _PAUSE * max(0.0, self.began + self.seconds - now)
        times = state.step_times
        left = self.began + _AIM * self.seconds - now
        off = left - self._needed(plan, recipe, times, state)
        if abs(off) <= max(_TOLERANCE * left, times.slowness * times.of_step(recipe.size) / 2):
            return plan
        changed = self._fitting(plan, recipe, times, self._left(times, recipe), state)
        if (changed.steps, changed.every) == (plan.steps, plan.every):
            return plan
        self._report(plan, changed, recipe, progress)
        return changed

    def validated(self, state: TrainState, seconds: float) -> None:
        """Learn from a validation of the training, which took so long."""
        self._validating += seconds
        times = state.step_times
        found = seconds / times.slowness
        counted = min(found, _OUTLIER * max(times.validation, self._last_validation))
        self._last_validation = found
        usual = 0.3 * times.validation + 0.7 * counted
        # What comes last is mostly an evaluation, too, and was measured at the same time.
        state.step_times = replace(times, validation=usual, last=times.last * usual / max(times.validation, 1e-9))

    def _begin(self, state: TrainState, now: float) -> None:
        planned = _PRIOR * self.seconds
        self._measured = (planned * state.step_times.slowness, planned)
        self._ratio = state.step_times.slowness
        if not self._reads:
            self._reads = range(state.step, state.step + state.plan.batches)
        self._announced = self._announced or state.plan.steps
        self._mark = self._next = now

    def _slowness(self, seconds: float, left: float) -> float:
        """The recent seconds over those planned, after a stretch of steps that took `seconds`.

        The average reaches back in proportion to the time left: all of a load that comes and goes matters to a long
        rest of the training, and only the load of now to its end. One stretch alone, however slow, does not mean that
        the machine is slow: it may have been suspended.
        """
        before, planned = self._measured
        usual, ratio = before / planned, seconds / self._work
        counted = min(ratio, _OUTLIER * max(usual, self._ratio)) * self._work
        self._ratio = ratio
        kept = math.exp(-counted / max(_MEMORY * left, counted))
        self._measured = (kept * before + counted, kept * planned + self._work)
        return self._measured[0] / self._measured[1]

    def _left(self, times: StepTimes, recipe: Recipe) -> float:
        """Seconds that a plan may take, so that its end is as near to the aim as whole steps allow."""
        step = times.slowness * times.of_step(recipe.size)
        return self.began + min(_AIM * self.seconds + step / 2, _LATEST * self.seconds) - time.monotonic()

    def _needed(self, plan: Plan, recipe: Recipe, times: StepTimes, state: TrainState | None) -> float:
        if state is None:
            return times.seconds(plan, recipe, reads=self._reads)
        size = state.size if state.batch else 0
        return times.seconds(plan, recipe, epoch=state.epoch, step=state.step, size=size, reads=self._reads)

    def _fitting(
        self, plan: Plan, recipe: Recipe, times: StepTimes, left: float, state: TrainState | None = None
    ) -> Plan:
        """The plan with as many steps as take at most so long, and at least one more."""
        step = state.step if state else 0

        def fitting(every: int) -> Plan:
            most = step + 2 + int(max(left, 0.0) / (times.slowness * min(times.steps.values())))
            steps = bisect(
                range(step + 2, most),
                left,
                key=lambda steps: self._needed(plan.changed(step, steps, every), recipe, times, state),
            )
            return plan.changed(step, step + 1 + steps, every)

        only_last = fitting(_ONLY_LAST)
        every = recipe.validate_every
        if not every:  # as often as _VALIDATION allows, and ten times at most
            number = int(_VALIDATION * self.seconds / max(times.slowness * times.validation, 1e-9))
            every = -(-only_last.epochs // max(1, min(10, number)))
        epoch = state.epoch if state else 0
        for fewer in (every, every + 1, every + 2):
            found = fitting(fewer)
            unused = left - self._needed(found, recipe, times, state)
            if unused <= _UNUSED * self.seconds or (fewer == every and found.validations(epoch) > 2):
                return found
        return only_last

    def _report(self, plan: Plan, changed: Plan, recipe: Recipe, progress: Progress) -> None:
        if changed.every > recipe.validate_every == plan.every:
            progress.warn(_left_out(plan.every))
        steps = plural(changed.steps, "step")
        if changed.steps * _ANNOUNCED <= self._announced:
            progress.warn(f"slower than planned: {steps} in place of {self._announced}, to end on time")
        elif changed.steps >= self._announced * _ANNOUNCED:
            progress.note(f"faster than planned: {steps} in place of {self._announced}, to use the time")
        else:
            return
        self._announced = changed.steps


def _left_out(every: int) -> str:
    return f"a validation is left out: validate_every {every} does not fit into the time"


def _durations(works: Iterable[object]) -> list[float]:
    """Seconds from the request for each item to its arrival; `works` is lazy, so this is the time of making it."""
    ends = [time.monotonic(), *(time.monotonic() for _ in works)]
    return [end - start for start, end in pairwise(ends)]


def _seconds_of_steps(context: TrainingContext) -> tuple[dict[int, float], float]:
    """Seconds of a step at the first and the last size, measured on a copy; and how much longer one takes that reads.

    All use the first batches of the training, which reading brings into its cache. If the cache is too small for them,
    every step reads.
    """
    recipe, plan = context.recipe, Plan(steps=1000, batches=1)
    scratch = scratch_copy(context)

    def measured(size: int) -> float:
        batches = chain.from_iterable(context.loader.epoch(0, size) for _ in range(_TRIALS))
        # The loss is read, because a GPU has not made a step when train_step returns.
        losses = (train_step(scratch, *batch, 0)[0].item() for batch in islice(batches, _TRIALS))
        return median(_durations(losses)[1:])  # with the wait for photos; the first step also allocates its memory

    first, last = plan.size(recipe, 0), recipe.size
    reading = measured(first)
    seconds = {size: measured(size) for size in sorted({first, last})}
    return seconds, max(0.0, reading - seconds[first])


def _synchronise(device: str) -> None:
    """Wait for the work that is queued on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()
