"""Keys of a recipe: what is read and what is refused. How recipes are loaded is in test_config.py."""

import pytest
from pydantic import ValidationError

from bnlab.config import load_settings
from bnlab.errors import RecipeError
from bnlab.recipe import LENGTH_KEYS, MACHINE_KEYS, Recipe, seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("20m", 1200), ("1h30m", 5400), ("90s", 90), ("90", 90), (45, 45), ("0.5h", 1800), ("1.5h", 5400), (".5", 0.5),
        ("1h 30m", 5400), (" 90 min ", 5400), ("1H2M3S", 3723), ("2 hours 5 minutes", 7500), ("1h30s", 3630),
        ("1hr", 3600), ("10 sec", 10),
    ],
)  # fmt: skip
def test_time_spans(text: object, seconds: float) -> None:
    assert seconds_of(text) == seconds
    assert Recipe(time=text).time == seconds


@pytest.mark.parametrize(
    "text",
    [
        "soon", "20x", "", " ", "1m20h", "..m", -5, 0, "0", "0m", "-5m", "1h30", "2m5", "1h 30", "1:30", "1h1h",
        "30m1h", "1e3", "1e3s", "inf", "nan", "½h", "١m", "h", "1 2 m", "1,5h", "20m!", True, "9" * 400,
        "1" + "0" * 30 + "h", float("inf"), float("nan"), 1e12, [20], "1h\n30m\n5",
    ],
)  # fmt: skip
def test_what_is_not_a_time_span_is_refused(text: object) -> None:
    with pytest.raises(ValidationError, match="time"):
        Recipe(time=text)


@pytest.mark.parametrize("text", ["1h30", "2m5"])
def test_a_number_without_unit_after_a_unit_is_ambiguous(text: str) -> None:
    with pytest.raises(ValidationError, match=r"1h30m or 90s: .* each number with its unit"):
        Recipe(time=text)


@pytest.mark.parametrize(
    "plan",
    [
        5, "x", [5], [[0, 9]], [[0, 9, 1, 1]], [[1, 9, 1]], [[0, 0, 1]], [[0, 9, 0]], [[0, 9, 1], [0, 8, 1]],
        [[0, 9, 1], [9, 9, 1]], [[0, 9, 1], [9, 12, 1]], [[0, 9, 1], [5, 8, 1], [4, 8, 1]],
        [["a", "b", "c"]], [[0, 9.5, 1]], None,
    ],
)  # fmt: skip
def test_what_is_not_a_plan_is_refused(plan: object) -> None:
    with pytest.raises(ValidationError, match="plan"):
        Recipe(plan=plan)
    assert Recipe(plan=[[0, 9, 1], [5, 8, 2]]).plan == ((0, 9, 1), (5, 8, 2))


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
    assert set(Recipe.model_fields) >= MACHINE_KEYS | LENGTH_KEYS


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (4095, (0, 4095)),
        ("4095", (0, 4095)),
        ([5, 9], (5, 9)),
        ("-1, 1.5", (-1, 1.5)),
        ("[0, 1]", (0, 1)),
        (None, None),
    ],
)
def test_a_pixel_range_is_one_number_or_two(given: object, expected: tuple[float, float]) -> None:
    assert load_settings(options={"pixel_range": given}).recipe.pixel_range == expected


@pytest.mark.parametrize("given", ["x", [1, 2, 3], [], (3, 2), [1, 1], 0, float("nan"), [0, float("inf")], {"a": 1}])
def test_other_pixel_ranges_are_refused(given: object) -> None:
    with pytest.raises(RecipeError, match=r"^pixel_range is .*: it"):
        load_settings(options={"pixel_range": given})
