"""Planning against a clock of the test's own."""

import pytest

from bnlab.progress import Silent
from bnlab.recipe import Recipe
from bnlab.training import budget as module
from bnlab.training.budget import Budget
from bnlab.training.checkpoint import Position
from bnlab.training.schedule import Pace, Plan


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


PACE = Pace(steps={32: 0.3, 48: 0.6, 64: 1.0}, judging=0.5)


def begun(steps: int) -> Position:
    return Position(plan=Plan(steps=steps, batches=10), pace=PACE)


def sat(clock: Clock, budget: Budget, position: Position, recipe: Recipe, slower: float) -> list[str]:
    """Train to the plan's end, so much slower than its pace, with a look at the plan after each 10 steps; warnings."""
    told = Silent()
    while position.step < position.plan.steps:
        position.epoch = position.step // 10
        if position.step % 10 == 0:
            position.plan = budget.replanned(position, recipe, told)
        seconds = slower * PACE.steps[position.plan.size(recipe, position.epoch)]
        clock.now += seconds
        position.training_seconds += seconds
        position.step += 1
        if position.step % 10 == 0 and position.plan.judges(recipe, position.epoch):
            clock.now += slower * PACE.judging
    clock.now += PACE.last
    return told.warnings


def test_as_fast_as_planned_nothing_changes(clock: Clock) -> None:
    budget = Budget(clock.now, 100.0)
    position = begun(90)
    assert sat(clock, budget, position, Recipe(size=64, grow_from=1), 1.0) == []
    assert position.step == 90


@pytest.mark.parametrize("slower", [1.3, 2.0, 4.0])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_slower_machine_ends_on_time_with_fewer_steps(clock: Clock, slower: float, share: float) -> None:
    recipe = Recipe(size=64, grow_from=share)
    budget = Budget(clock.now, 100.0)
    position = begun(90 if share == 1 else 140)
    warnings = sat(clock, budget, position, recipe, slower)
    assert 72 < clock.now - 1000 < 108
    assert "slower than planned" in warnings[0]
    assert position.plan.progress(position.step) == pytest.approx(1)
    assert position.plan.learning_rate(recipe, position.step - 1) < 0.01 * recipe.learning_rate


def test_a_machine_that_recovers_goes_back_to_the_plan(clock: Clock) -> None:
    budget, position, recipe = Budget(clock.now, 200.0), begun(180), Recipe(size=64, grow_from=1)
    told: list[int] = []
    while position.step < position.plan.steps:
        position.epoch = position.step // 10
        if position.step % 10 == 0:
            position.plan = budget.replanned(position, recipe, Silent())
            told.append(position.plan.steps)
        seconds = 1.4 if 30 <= position.step < 60 else 0.85
        clock.now, position.training_seconds = clock.now + seconds, position.training_seconds + seconds
        position.step += 1
    assert min(told) < 170
    assert position.step > 170
    assert max(told) == 180
    assert clock.now - 1000 < 200


def test_a_plan_is_never_longer(clock: Clock) -> None:
    budget = Budget(clock.now, 100.0)
    position = begun(50)
    assert sat(clock, budget, position, Recipe(size=64, grow_from=1), 0.1) == []
    assert position.step == 50


def test_time_that_is_over_leaves_one_step(clock: Clock) -> None:
    budget, position = Budget(clock.now, 10.0), begun(50)
    position.step, position.training_seconds, clock.now = 20, 50.0, clock.now + 50
    assert budget.replanned(position, Recipe(size=64), Silent()).steps == 21


def test_small_photos_are_not_taken_for_a_slow_machine(clock: Clock) -> None:
    """A step of a quarter of the pixels takes more than a quarter of the time, and was planned to."""
    budget, position = Budget(clock.now, 106.0), begun(150)
    assert sat(clock, budget, position, Recipe(size=64), 1.0) == []


def test_a_slow_beginning_is_no_slow_machine(clock: Clock) -> None:
    budget, position, recipe = Budget(clock.now, 100.0), begun(80), Recipe(size=64, grow_from=1)
    position.step, position.training_seconds, clock.now = 10, 16.0, clock.now + 16
    assert budget.replanned(position, recipe, Silent()).steps == 80
    assert sat(clock, budget, position, recipe, 1.0) == []
    assert clock.now - 1000 < 100


def test_the_pace_of_a_plan() -> None:
    plan, recipe = Plan(steps=30, batches=10), Recipe(size=64)
    assert [plan.size(recipe, epoch) for epoch in range(3)] == [32, 48, 64]
    assert PACE.seconds(plan, recipe, 0, 30) == pytest.approx(19)
    assert PACE.seconds(plan, recipe, 5, 12) == pytest.approx(5 * 0.3 + 2 * 0.6)
    assert PACE.seconds(plan, recipe, 25, 25) == 0
