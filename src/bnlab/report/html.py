"""Renders the templates of pages, and numbers as text."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from bnlab.errors import printable


def render(template: str, **values: Any) -> str:
    """The page that a template gives; a missing value is an error, and all values are escaped."""
    environment = Environment(
        loader=PackageLoader("bnlab.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"percent": _percent, "printable": printable, "format_number": format_number}
    return environment.get_template(template).render(**values)


def format_number(value: float | None) -> str:
    """A number to three digits, with an exponent only where it is very large or small; None and NaN are a dash."""
    if value is None or value != value:  # noqa: PLR0124 (NaN)
        return "–"
    if value in (float("inf"), float("-inf")):
        return "∞" if value > 0 else "−∞"
    if value and not 1e-3 <= abs(value) < 1e6:
        text = f"{value:.2e}"
    else:
        text = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "−")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
