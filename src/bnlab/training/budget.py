"""Training for a wall-clock time: how many steps fit into it, by the speed that was measured here."""

import time
from collections.abc import Callable

import numpy as np

from bnlab.errors import UsageError
from bnlab.progress import Progress
from bnlab.recipe import Recipe
from bnlab.training.checkpoint import Position
from bnlab.training.loop import Trainee, train_step
from bnlab.training.schedule import Plan
from bnlab.training.trainee import throwaway

_MARGIN = 0.03  # share of the time that is left unplanned
_JUDGING = 0.06  # the largest share of the time that is spent on judging
_SLOWER = 1.05  # a plan is shortened when its end comes later than by this


class Budget:
    """Keeps a training within `seconds` of `began`, by time.monotonic, of which `reserve` are for what comes last."""

    def __init__(self, began: float, seconds: float, reserve: float = 0.0) -> None:
        self.end = began + seconds
        self.reserve = reserve
        self._since = time.monotonic()
        self._work = 0.0
        self._step: int | None = None

    def planned(self, trainee: Trainee, judge: Callable[[], object], progress: Progress) -> Recipe:
        """The recipe with the steps that fit, and with how often to judge.

        A copy of the network does three steps at each size it will see, and is judged once.

        Raises:
            UsageError: not even one step fits.
        """
        recipe, batches = trainee.recipe, trainee.loader.batches
        began = time.monotonic()
        judge()
        judging = time.monotonic() - began
        self.reserve = 1.5 * judging + 1.0  # the best is read back and judged once more, and the report written
        seconds = _seconds_of_steps(trainee)
        left = (self.end - time.monotonic() - self.reserve) * (1 - _MARGIN)
        mean = _mean_step(recipe, seconds)
        steps = int((left - judging) / mean)
        every = recipe.judge_every
        if not every:  # as often as _JUDGING allows, and ten times at most
            epochs = max(1, -(-steps // batches))
            times = max(1, min(10, int(_JUDGING * left / judging)))
            every = -(-epochs // times)
            steps = int((left - judging * -(-epochs // every)) / mean)
        if steps < 1:
            raise UsageError(
                f"not one step fits into {recipe.time:.0f} s: one takes {mean:.2f} s, and what goes before and after "
                f"{(recipe.time or 0) - left:.0f} s",
                "give more --time, or a smaller --size",
            )
        recipe = recipe.model_copy(update={"steps": steps, "judge_every": every})
        plan = Plan.of(recipe, batches)
        progress.note(
            f"{plan.steps} steps ({plan.steps / batches:.1f} epochs) fit into the time: one takes {mean:.3f} s on "
            f"average, a judgement {judging:.1f} s; the same once more: --set steps={steps} --set judge_every={every}"
        )
        return recipe

    def replanned(self, position: Position, recipe: Recipe, progress: Progress) -> Plan:
        """The plan, shorter where this sitting's speed would end it late. Work is counted as steps times size squared.

        A plan is never made longer, so that a machine that is not disturbed gives the same training again.
        """
        now, plan = time.monotonic(), position.plan
        if self._step is None:  # a new sitting: there is no speed to judge by yet
            self._step, self._since = position.step, now
            return plan
        done = _work(plan, recipe, self._step, position.step)
        to_do = _work(plan, recipe, position.step, plan.steps)
        if not done or not to_do:
            return plan
        speed = done / (now - self._since)  # judging counted in
        left = self.end - self.reserve - now
        if to_do / speed <= left * _SLOWER:
            return plan
        steps = position.step + max(1, int((plan.steps - position.step) * max(left, 0.0) * speed / to_do))
        if steps >= plan.steps:
            return plan
        progress.warn(f"slower than planned: {steps} steps in place of {plan.steps}, to end on time")
        return plan.shortened(position.step, steps)


def _work(plan: Plan, recipe: Recipe, first: int, last: int) -> float:
    """Of the steps from one to another: each counts as the square of its size."""
    work = 0.0
    for epoch in range(first // plan.batches, -(-last // plan.batches)):
        steps = min(last, (epoch + 1) * plan.batches) - max(first, epoch * plan.batches)
        work += steps * float(plan.size(recipe, epoch)) ** 2
    return work


def _mean_step(recipe: Recipe, seconds: dict[int, float]) -> float:
    """Seconds of a step, over a training that grows through these sizes."""
    plan = Plan(steps=1000, batches=1)
    return float(np.mean([seconds[plan.size(recipe, epoch)] for epoch in range(1000)]))


def _seconds_of_steps(trainee: Trainee) -> dict[int, float]:
    """Of one step at each size that will be seen, by a copy that is then thrown away."""
    recipe, loader = trainee.recipe, trainee.loader
    plan = Plan(steps=1000, batches=1)
    sizes = sorted({plan.size(recipe, epoch) for epoch in range(1000)})
    one = throwaway(trainee)
    seconds = {}
    for size in sizes:
        batch = next(iter(loader.epoch(0, size)))
        times = []
        for step in range(5):
            began = time.monotonic()
            train_step(one, *batch, step)
            times.append(time.monotonic() - began)
        seconds[size] = float(np.median(times[1:]))  # the first finds its memory
    return seconds
