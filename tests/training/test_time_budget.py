"""Planning by a fake clock."""

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


STEP_TIMES = StepTimes(steps={32: 0.3, 48: 0.6, 64: 1.0}, validation=0.5, last=1.0)


def begun(steps: int) -> TrainState:
    return TrainState(plan=Plan(steps=steps, batches=10), step_times=STEP_TIMES)


def train(clock: Clock, budget: TimeBudget, state: TrainState, recipe: Recipe, slower: float) -> list[str]:
    """Train to the end of the plan, slower than planned by this factor, and give the warnings."""
    progress = NullProgress()
    while state.step < state.plan.steps:
        state.epoch, state.batch = divmod(state.step, 10)
        if not state.batch:
            state.size = state.plan.size(recipe, state.epoch)
        if state.step % 5 == 0:
            state.plan = budget.replanned(state, recipe, progress)
        stepped(clock, state, slower * STEP_TIMES.steps[state.size])
        if state.step % 10 == 0 and state.plan.validates(recipe, state.epoch):
            clock.now += slower * STEP_TIMES.validation
    clock.now += STEP_TIMES.last
    return progress.warnings


def stepped(clock: Clock, state: TrainState, seconds: float) -> None:
    """Make one step that takes so long."""
    clock.now += seconds
    state.training_seconds += seconds
    state.planned_seconds += STEP_TIMES.steps[state.size]
    state.step += 1


def test_as_fast_as_planned_nothing_changes(clock: Clock) -> None:
    budget = TimeBudget(clock.now, 100.0)
    state = begun(90)
    assert train(clock, budget, state, Recipe(size=64, start_size=1), 1.0) == []
    assert state.step == 90


@pytest.mark.parametrize("slower", [1.3, 2.0, 4.0])
@pytest.mark.parametrize("start_size", [1.0, 0.5])
def test_a_slower_machine_ends_on_time_with_fewer_steps(clock: Clock, slower: float, start_size: float) -> None:
    recipe = Recipe(size=64, start_size=start_size)
    budget = TimeBudget(clock.now, 100.0)
    state = begun(90 if start_size == 1 else 140)
    warnings = train(clock, budget, state, recipe, slower)
    assert 72 < clock.now - 1000 < 108
    assert "slower than planned" in warnings[0]
    assert state.plan.progress(state.step) == pytest.approx(1)
    assert state.plan.learning_rate(recipe, state.step - 1) < 0.01 * recipe.learning_rate


def test_a_machine_that_recovers_goes_back_to_the_plan(clock: Clock) -> None:
    budget, state, recipe = TimeBudget(clock.now, 400.0), begun(360), Recipe(size=64, start_size=1)
    state.size = 64
    steps: list[int] = []
    while state.step < state.plan.steps:
        state.epoch, state.batch = divmod(state.step, 10)
        state.plan = budget.replanned(state, recipe, NullProgress())
        steps.append(state.plan.steps)
        stepped(clock, state, 1.5 if 100 <= state.step < 150 else 0.85)
    assert min(steps) < 320
    assert state.step > 340
    assert max(steps) == 360
    assert clock.now - 1000 < 400


def test_a_plan_is_never_longer(clock: Clock) -> None:
    budget = TimeBudget(clock.now, 100.0)
    state = begun(50)
    assert train(clock, budget, state, Recipe(size=64, start_size=1), 0.1) == []
    assert state.step == 50


def test_time_that_is_over_leaves_one_step(clock: Clock) -> None:
    budget, state = TimeBudget(clock.now, 10.0), begun(50)
    state.step, state.size, clock.now = 20, 64, clock.now + 50
    state.training_seconds = state.planned_seconds = 50.0
    assert budget.replanned(state, Recipe(size=64), NullProgress()).steps == 21


def test_one_slow_step_does_not_change_the_plan(clock: Clock) -> None:
    """A single step that hangs does not mean that the machine is slow."""
    budget, state, recipe = TimeBudget(clock.now, 200.0), begun(150), Recipe(size=64, start_size=1)
    state.size = 64
    while state.step < 150:
        state.epoch, state.batch = divmod(state.step, 10)
        state.plan = budget.replanned(state, recipe, progress := NullProgress())
        assert progress.warnings == []
        stepped(clock, state, 4.0 if state.step == 77 else 1.0)


def test_steps_of_small_photos_are_planned_at_their_own_speed(clock: Clock) -> None:
    """A step with a quarter of the pixels takes more than a quarter of the time, as planned."""
    budget, state = TimeBudget(clock.now, 106.0), begun(150)
    assert train(clock, budget, state, Recipe(size=64), 1.0) == []


def test_a_slow_beginning_does_not_change_the_plan(clock: Clock) -> None:
    budget, state, recipe = TimeBudget(clock.now, 200.0), begun(150), Recipe(size=64, start_size=1)
    state.size = 64
    for _ in range(20):
        stepped(clock, state, 1.6)
    state.epoch = 2
    assert budget.replanned(state, recipe, NullProgress()).steps == 150
    assert train(clock, budget, state, recipe, 1.0) == []
    assert clock.now - 1000 < 200


def test_the_time_that_a_plan_takes() -> None:
    plan, recipe = Plan(steps=28, batches=10), Recipe(size=64)
    assert [plan.size(recipe, epoch) for epoch in range(3)] == [48, 64, 64]
    assert STEP_TIMES.seconds(plan, recipe) == pytest.approx(10 * 0.6 + 18)
    assert STEP_TIMES.seconds(plan, recipe, 0, 5) == pytest.approx(5 * 0.6 + 18)
    assert STEP_TIMES.seconds(plan, recipe, 1, 15, 32) == pytest.approx(5 * 0.3 + 8)
    assert STEP_TIMES.seconds(plan, recipe, 2, 28) == 0


def test_steps_that_fit() -> None:
    recipe = Recipe(size=64)
    for seconds in (0.0, 0.5, 5.0, 33.3, 100.0):
        steps = _steps_in(seconds, recipe, 10, STEP_TIMES)
        assert STEP_TIMES.seconds(Plan(steps=max(steps, 1), batches=10), recipe) <= max(seconds, 1.0)
        assert STEP_TIMES.seconds(Plan(steps=steps + 1, batches=10), recipe) > seconds
    assert _steps_in(-5.0, recipe, 10, STEP_TIMES) == 0
