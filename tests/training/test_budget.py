"""Planning against a clock of the test's own."""

import pytest

from bnlab.progress import Silent
from bnlab.recipe import Recipe
from bnlab.training import budget as module
from bnlab.training.budget import Budget
from bnlab.training.checkpoint import Position
from bnlab.training.schedule import Plan


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


def sat(clock: Clock, budget: Budget, position: Position, recipe: Recipe, seconds: float) -> list[str]:
    """Train to the plan's end, every step taking so long, with a look at the plan after each 10; the warnings."""
    told = Silent()
    while position.step < position.plan.steps:
        if position.step % 10 == 0:
            position.plan = budget.replanned(position, recipe, told)
        clock.now += seconds * (position.plan.size(recipe, position.step // position.plan.batches) / 64) ** 2
        position.step += 1
    return told.warnings


def test_as_fast_as_planned_nothing_changes(clock: Clock) -> None:
    budget = Budget(clock.now, 100.0, reserve=5.0)
    position = Position(plan=Plan(steps=95, batches=10))
    assert sat(clock, budget, position, Recipe(size=64, grow_from=1), 1.0) == []
    assert position.step == 95


@pytest.mark.parametrize("slower", [1.3, 2.0, 4.0])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_slower_machine_ends_on_time_with_fewer_steps(clock: Clock, slower: float, share: float) -> None:
    recipe = Recipe(size=64, grow_from=share)
    budget = Budget(clock.now, 100.0)
    position = Position(plan=Plan(steps=95 if share == 1 else 160, batches=10))
    warnings = sat(clock, budget, position, recipe, slower)
    assert 78 < clock.now - 1000 < 108
    assert "slower than planned" in warnings[0]
    assert position.plan.progress(position.step) == pytest.approx(1)
    assert position.plan.learning_rate(recipe, position.step - 1) < 0.01 * recipe.learning_rate


def test_a_plan_is_never_longer(clock: Clock) -> None:
    budget = Budget(clock.now, 100.0)
    position = Position(plan=Plan(steps=50, batches=10))
    assert sat(clock, budget, position, Recipe(size=64, grow_from=1), 0.1) == []
    assert position.step == 50


def test_time_that_is_over_leaves_one_step(clock: Clock) -> None:
    budget = Budget(clock.now, 10.0)
    position = Position(plan=Plan(steps=50, batches=10))
    recipe = Recipe(size=64)
    position.plan = budget.replanned(position, recipe, Silent())
    position.step, clock.now = 20, clock.now + 50
    assert budget.replanned(position, recipe, Silent()).steps == 21
