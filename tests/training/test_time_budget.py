"""Planning against a clock of the test's own."""

import pytest

from bnlab.progress import NullProgress
from bnlab.recipe import Recipe
from bnlab.training import time_budget as module
from bnlab.training.schedule import Plan, StepTimes
from bnlab.training.state import TrainState
from bnlab.training.time_budget import TimeBudget, _steps_in


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    one = Clock()
    monkeypatch.setattr(module, "time", one)
    return one


PACE = StepTimes(steps={32: 0.3, 48: 0.6, 64: 1.0}, validation=0.5, last=1.0)


def begun(steps: int) -> TrainState:
    return TrainState(plan=Plan(steps=steps, batches=10), step_times=PACE)


def sat(clock: Clock, budget: TimeBudget, position: TrainState, recipe: Recipe, slower: float) -> list[str]:
    """Train to the plan's end, so much slower than its pace, with a look at the plan after each 10 steps; warnings."""
    told = NullProgress()
    while position.step < position.plan.steps:
        position.epoch, position.batch = divmod(position.step, 10)
        if not position.batch:
            position.size = position.plan.size(recipe, position.epoch)
        if position.step % 5 == 0:
            position.plan = budget.replanned(position, recipe, told)
        stepped(clock, position, slower * PACE.steps[position.size])
        if position.step % 10 == 0 and position.plan.validates(recipe, position.epoch):
            clock.now += slower * PACE.validation
    clock.now += PACE.last
    return told.warnings


def stepped(clock: Clock, position: TrainState, seconds: float) -> None:
    """One step that took so long."""
    clock.now += seconds
    position.training_seconds += seconds
    position.planned_seconds += PACE.steps[position.size]
    position.step += 1


def test_as_fast_as_planned_nothing_changes(clock: Clock) -> None:
    budget = TimeBudget(clock.now, 100.0)
    position = begun(90)
    assert sat(clock, budget, position, Recipe(size=64, start_size=1), 1.0) == []
    assert position.step == 90


@pytest.mark.parametrize("slower", [1.3, 2.0, 4.0])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_slower_machine_ends_on_time_with_fewer_steps(clock: Clock, slower: float, share: float) -> None:
    recipe = Recipe(size=64, start_size=share)
    budget = TimeBudget(clock.now, 100.0)
    position = begun(90 if share == 1 else 140)
    warnings = sat(clock, budget, position, recipe, slower)
    assert 72 < clock.now - 1000 < 108
    assert "slower than planned" in warnings[0]
    assert position.plan.progress(position.step) == pytest.approx(1)
    assert position.plan.learning_rate(recipe, position.step - 1) < 0.01 * recipe.learning_rate


def test_a_machine_that_recovers_goes_back_to_the_plan(clock: Clock) -> None:
    budget, position, recipe = TimeBudget(clock.now, 400.0), begun(360), Recipe(size=64, start_size=1)
    position.size = 64
    told: list[int] = []
    while position.step < position.plan.steps:
        position.epoch, position.batch = divmod(position.step, 10)
        position.plan = budget.replanned(position, recipe, NullProgress())
        told.append(position.plan.steps)
        stepped(clock, position, 1.5 if 100 <= position.step < 150 else 0.85)
    assert min(told) < 320
    assert position.step > 340
    assert max(told) == 360
    assert clock.now - 1000 < 400


def test_a_plan_is_never_longer(clock: Clock) -> None:
    budget = TimeBudget(clock.now, 100.0)
    position = begun(50)
    assert sat(clock, budget, position, Recipe(size=64, start_size=1), 0.1) == []
    assert position.step == 50


def test_time_that_is_over_leaves_one_step(clock: Clock) -> None:
    budget, position = TimeBudget(clock.now, 10.0), begun(50)
    position.step, position.size, clock.now = 20, 64, clock.now + 50
    position.training_seconds = position.planned_seconds = 50.0
    assert budget.replanned(position, Recipe(size=64), NullProgress()).steps == 21


def test_a_look_is_at_many_steps(clock: Clock) -> None:
    """One step that hung, as the system has it, is no slow machine."""
    budget, position, recipe = TimeBudget(clock.now, 200.0), begun(150), Recipe(size=64, start_size=1)
    position.size = 64
    while position.step < 150:
        position.epoch, position.batch = divmod(position.step, 10)
        position.plan = budget.replanned(position, recipe, told := NullProgress())
        assert told.warnings == []
        stepped(clock, position, 4.0 if position.step == 77 else 1.0)


def test_small_photos_are_not_taken_for_a_slow_machine(clock: Clock) -> None:
    """A step of a quarter of the pixels takes more than a quarter of the time, and was planned to."""
    budget, position = TimeBudget(clock.now, 106.0), begun(150)
    assert sat(clock, budget, position, Recipe(size=64), 1.0) == []


def test_a_slow_beginning_is_no_slow_machine(clock: Clock) -> None:
    budget, position, recipe = TimeBudget(clock.now, 200.0), begun(150), Recipe(size=64, start_size=1)
    position.size = 64
    for _ in range(20):
        stepped(clock, position, 1.6)
    position.epoch = 2
    assert budget.replanned(position, recipe, NullProgress()).steps == 150
    assert sat(clock, budget, position, recipe, 1.0) == []
    assert clock.now - 1000 < 200


def test_the_pace_of_a_plan() -> None:
    plan, recipe = Plan(steps=28, batches=10), Recipe(size=64)
    assert [plan.size(recipe, epoch) for epoch in range(3)] == [48, 64, 64]
    assert PACE.seconds(plan, recipe) == pytest.approx(10 * 0.6 + 18)
    assert PACE.seconds(plan, recipe, 0, 5) == pytest.approx(5 * 0.6 + 18)
    assert PACE.seconds(plan, recipe, 1, 15, 32) == pytest.approx(5 * 0.3 + 8)
    assert PACE.seconds(plan, recipe, 2, 28) == 0


def test_steps_that_fit() -> None:
    recipe = Recipe(size=64)
    for seconds in (0.0, 0.5, 5.0, 33.3, 100.0):
        steps = _steps_in(seconds, recipe, 10, PACE)
        assert PACE.seconds(Plan(steps=max(steps, 1), batches=10), recipe) <= max(seconds, 1.0)
        assert PACE.seconds(Plan(steps=steps + 1, batches=10), recipe) > seconds
    assert _steps_in(-5.0, recipe, 10, PACE) == 0
