"""Keys of a recipe: what is read and what is refused. How recipes are loaded is in test_config.py."""

import pytest
from pydantic import ValidationError

from bnlab.recipe import MACHINE_KEYS, Recipe, seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"), [("20m", 1200), ("1h30m", 5400), ("90s", 90), ("90", 90), (45, 45), ("0.5h", 1800)]
)
def test_time_spans(text: object, seconds: float) -> None:
    assert seconds_of(text) == seconds
    assert Recipe(time=text).time == seconds


@pytest.mark.parametrize("text", ["soon", "20x", "", "1m20h", "..m", -5, 0])
def test_what_is_not_a_time_span_is_refused(text: object) -> None:
    with pytest.raises(ValidationError, match="time"):
        Recipe(time=text)


@pytest.mark.parametrize("key", ["crop_area", "crop_aspect"])
@pytest.mark.parametrize("ends", [(0.9, 0.2), (0.0, 1.0)])
def test_ranges_rise(key: str, ends: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match=key):
        Recipe(**{key: ends})
    assert getattr(Recipe(**{key: (0.5, 0.5)}), key) == (0.5, 0.5)


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().size = 64


def test_keys_of_the_tables_exist() -> None:
    assert set(Recipe.model_fields) >= MACHINE_KEYS
