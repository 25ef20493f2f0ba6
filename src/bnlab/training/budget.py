"""Training for a wall-clock time: how many steps fit into it, by the speed that was measured here."""

import time
from collections.abc import Callable

import numpy as np

from bnlab.errors import UsageError
from bnlab.progress import Progress
from bnlab.recipe import Recipe
from bnlab.training.checkpoint import Position
from bnlab.training.loop import Trainee, train_step
from bnlab.training.schedule import Pace, Plan
from bnlab.training.trainee import throwaway

_MARGIN = 0.03  # share of the time that is left unplanned
_JUDGING = 0.06  # the largest share of the time that is spent on judging
_LATE = 1.04  # a plan is changed when what is left of it takes longer than is left by this, or less
_BELIEVED = 0.2  # share of the time before which no speed is believed: photos are read for the first time, and the like


class Budget:
    """Keeps a training within `seconds` of `began`, by time.monotonic."""

    def __init__(self, began: float, seconds: float) -> None:
        self.seconds, self.end = seconds, began + seconds
        self._seen = (0, 0.0)  # steps, and seconds of training, at the last look
        self._slowness: float | None = None  # found there

    def planned(self, trainee: Trainee, judge: Callable[[], object], progress: Progress) -> tuple[Recipe, Pace]:
        """The recipe with the steps that fit and with how often to judge, and the pace this was planned by.

        A copy of the network does a few steps at each size it will see, and is judged once.

        Raises:
            UsageError: not even one step fits.
        """
        recipe, batches = trainee.recipe, trainee.loader.batches
        began = time.monotonic()
        judge()
        judging = time.monotonic() - began
        pace = Pace(steps=_seconds_of_steps(trainee), judging=judging)
        left = (self.end - time.monotonic() - pace.last) * (1 - _MARGIN)
        mean = _mean_step(recipe, pace.steps)
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
        progress.note(
            f"{steps} steps ({steps / batches:.1f} epochs) fit into the time: one takes {mean:.3f} s on average, a "
            f"judgement {judging:.1f} s; the same once more: --set steps={steps} --set judge_every={every}"
        )
        return recipe, pace

    def replanned(self, position: Position, recipe: Recipe, progress: Progress) -> Plan:
        """The plan, shorter where at the speed of late it would end late, and back where that has passed.

        A plan is never longer than at first, so that a machine that is not disturbed gives the same training again.
        """
        plan, pace = position.plan, position.pace
        (step, seconds), self._seen = self._seen, (position.step, position.training_seconds)
        left = self.end - time.monotonic() - pace.last
        if left > (1 - _BELIEVED) * self.seconds or not step < position.step < plan.steps:
            return plan
        slowness = (position.training_seconds - seconds) / pace.seconds(plan, recipe, step, position.step)
        slowness, self._slowness = (slowness + (self._slowness or slowness)) / 2, slowness
        judging = pace.judging * sum(plan.judges(recipe, epoch) for epoch in range(position.epoch, plan.epochs))
        left = max(0.0, left - judging * max(1.0, slowness))
        rest = plan.steps - position.step
        fit = left / (slowness * pace.seconds(plan, recipe, position.step, plan.steps))  # times the rest
        if 1 / _LATE <= fit <= _LATE:
            return plan
        steps = min(plan.wanted or plan.steps, position.step + max(1, int(rest * fit)))
        if steps == plan.steps:
            return plan
        faster = "faster again" if steps > plan.steps else "slower than planned"
        progress.warn(f"{faster}: {steps} steps in place of {plan.steps}, to end on time")
        return plan.changed(position.step, steps)


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
