import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnlab.recipe import Recipe
from bnlab.training.schedule import Plan


def rates(total: int, **changes: object) -> list[float]:
    recipe = Recipe.model_validate({"learning_rate": 0.5} | changes)
    return [Plan(steps=total, batches=10).learning_rate(recipe, step) for step in range(total)]


def test_constant() -> None:
    assert set(rates(10, schedule="constant")) == {0.5}


def test_step_falls_by_its_factor() -> None:
    values = rates(4000, schedule="step", step_every=1500, step_factor=0.1)
    assert values[0] == values[1499] == 0.5
    assert values[1500] == values[2999] == pytest.approx(0.05)
    assert values[3000] == pytest.approx(0.005)


@pytest.mark.parametrize("warmup", [0.0, 0.25, 1.0])
def test_one_cycle_rises_once_and_falls_once(warmup: float) -> None:
    values = rates(100, schedule="one-cycle", warmup=warmup)
    top = values.index(max(values))
    assert max(values) == pytest.approx(0.5, rel=1e-3)
    assert top == {0.0: 0, 0.25: 24, 1.0: 99}[warmup]
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)
    assert min(values) > 0
    if warmup < 1:
        assert values[-1] == pytest.approx(0.5e-4)


def test_exponential_falls_by_its_factor_in_so_many_epochs() -> None:
    values = rates(200, schedule="exponential", decay_factor=0.96, decay_epochs=8)  # of 10 steps
    assert values[0] == 0.5
    assert values[80] == pytest.approx(0.5 * 0.96)
    assert values[160] == pytest.approx(0.5 * 0.96**2)
    assert values[40] == pytest.approx(0.5 * 0.96**0.5)


def test_a_plan_follows_the_recipe() -> None:
    assert Plan.of(Recipe(epochs=3), 7) == Plan(steps=21, batches=7)
    plan = Plan.of(Recipe(epochs=3, steps=15), 7)
    assert (plan.steps, plan.epochs) == (15, 3)


@given(st.integers(1, 200), st.integers(0, 199), st.integers(1, 200))
def test_a_plan_that_was_shortened_goes_on_where_it_was_and_ends_at_1(steps: int, at: int, left: int) -> None:
    at = min(at, steps - 1)
    plan = Plan(steps=steps, batches=10)
    shorter = plan.changed(at, at + left, 1)
    assert shorter.progress(at) == plan.progress(at)
    assert shorter.progress(at + left) == pytest.approx(1)
    again = shorter.changed(at + left // 2, at + left // 2 + 1, 2)
    assert again.progress(at + left // 2) == pytest.approx(shorter.progress(at + left // 2))
    assert again.progress(again.steps) == pytest.approx(1)


def test_of_two_changes_before_the_same_step_the_last_holds() -> None:
    """A busy machine changes the first plan before any step."""
    plan = Plan(steps=1, batches=3).changed(0, 328, 11).changed(0, 302, 11).changed(1, 218, 8)
    assert plan.changes == ((0, 302, 11), (1, 218, 8))
    recipe = Recipe(plan=plan.changes)
    assert Plan.of(recipe, 3).repeated(recipe, 1) == plan


def test_sizes_grow_to_the_last() -> None:
    recipe = Recipe(start_size=0.5, size=128)
    plan = Plan(steps=100, batches=1)
    sizes = [plan.size(recipe, epoch) for epoch in range(100)]
    assert sizes == sorted(sizes)
    assert set(sizes) == {64, 80, 96, 112, 128}
    assert [sizes.count(size) for size in (64, 80, 96, 112, 128)] == [20] * 5
    assert {plan.size(Recipe(size=120, start_size=1.0), epoch) for epoch in range(100)} == {120}
    short = [[Plan(steps=n * 9, batches=9).size(recipe, epoch) for epoch in range(n)] for n in (1, 2, 3)]
    assert short == [[128], [96, 128], [80, 112, 128]]
    partial = Plan(steps=15, batches=10)
    assert [partial.size(recipe, epoch) for epoch in range(2)] == [112, 128]
    assert {plan.size(Recipe(size=32), epoch) for epoch in range(100)} == {32}
    assert {plan.size(Recipe(size=50, start_size=0.1), epoch) for epoch in range(100)} == {32, 48, 50}


def test_validations_are_about_ten_or_as_often_as_set_and_at_the_end() -> None:
    def validate(epochs: int, **changes: object) -> list[int]:
        plan = Plan.of(Recipe.model_validate(changes | {"steps": epochs * 5 - 2}), 5)
        found = [epoch + 1 for epoch in range(epochs) if plan.validates(epoch)]
        assert [plan.validations(epoch) for epoch in range(epochs)] == [
            sum(number > epoch for number in found) for epoch in range(epochs)
        ]
        return found

    assert validate(8) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert validate(45) == [5, 10, 15, 20, 25, 30, 35, 40, 45]
    assert validate(47) == [5, 10, 15, 20, 25, 30, 35, 40, 45, 47]
    assert validate(7, validate_every=3) == [3, 6, 7]
    assert validate(7, validate_every=100) == [7]
