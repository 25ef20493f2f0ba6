import re

from bnlab.report.plots import Plot, Series, plot_svg


def labels(**more: object) -> set[str]:
    series = Series(name="a", x=(1.0, 2.0, 20.0)[: 3 if more else 2], y=(2e-5, 3e-5, 6e-5)[: 3 if more else 2])
    plot = Plot(title="t", x="steps", y="y", series=(series,), caption="c", table="t", **more)  # type: ignore[arg-type]
    return set(re.findall(r"<!-- (.*?) -->", plot_svg(plot)))


def test_numbers_of_logarithmic_axes_are_plain() -> None:
    """Text is not read as mathematics here, so matplotlib's own labels would stand there as TeX."""
    said = labels(log_x=True, log_y=True)
    assert not [label for label in said if "\\" in label or "$" in label]
    assert {"1", "10", "2e−05"} <= said


def test_steps_are_whole() -> None:
    said = labels()
    assert {"1", "2"} <= said
    assert not [label for label in said if re.fullmatch(r"1\.\d+", label)]
