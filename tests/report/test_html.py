import jinja2
import pytest

from bnlab.report.html import format_number, render


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (float("inf"), "∞"),
        (float("-inf"), "−∞"),
        (0, "0"),
        (0.12345, "0.123"),
        (-2.5, "−2.5"),
        (123.4, "123"),
        (12345.6, "12346"),
        (1.5e6, "1.50e+06"),
        (-1.5e-4, "−1.50e−04"),
    ],
)
def test_numbers_are_given_to_three_digits(value: float | None, text: str) -> None:
    assert format_number(value) == text


ABOUT = {
    "title": "t",
    "data": "<b>",
    "seeds": 1,
    "budget": "quick",
    "reports": [],
    "page": "p",
    "environment": {"a": 1, "date": "d"},
}


def test_values_are_escaped() -> None:
    page = render("studies.html", **ABOUT)
    assert "&lt;b&gt;" in page
    assert "<dt>a</dt><dd>1</dd>" in page


def test_a_missing_value_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="seeds"):
        render("studies.html", **{key: value for key, value in ABOUT.items() if key != "seeds"})
