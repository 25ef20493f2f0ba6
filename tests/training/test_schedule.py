import pytest

from bnlab.recipe import Recipe
from bnlab.training.schedule import learning_rate


def rates(total: int, **changes: object) -> list[float]:
    recipe = Recipe.model_validate({"learning_rate": 0.5} | changes)
    return [learning_rate(recipe, step, total) for step in range(total)]


def test_constant() -> None:
    assert set(rates(10, schedule="constant")) == {0.5}


def test_step_is_the_tutorials() -> None:
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
