"""Templates to pages."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from bnlab.errors import printable


def render(template: str, **values: Any) -> str:
    """A page of a template; what is not given is an error, and what is given is escaped."""
    environment = Environment(
        loader=PackageLoader("bnlab.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"percent": _percent, "printable": printable, "figure": format_number}
    return environment.get_template(template).render(**values)


def format_number(value: float | None) -> str:
    """A number to three digits, as one reads it: no exponent where none is needed."""
    if value is None or value != value:  # noqa: PLR0124 (NaN)
        return "–"
    if value in (float("inf"), float("-inf")):
        return "∞" if value > 0 else "−∞"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    digits = 0 if abs(value) >= 1000 else 3
    text = f"{value:.{digits}g}" if digits else f"{value:.0f}"
    return text.replace("-", "−")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
