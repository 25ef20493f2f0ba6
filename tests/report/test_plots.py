import re

from bnlab.report.plots import Plot, Series, plot_png, plot_svg


def labels(**more: object) -> set[str]:
    series = Series(name="a", x=(1.0, 2.0, 20.0)[: 3 if more else 2], y=(2e-5, 3e-5, 6e-5)[: 3 if more else 2])
    plot = Plot(title="t", x="steps", y="y", series=(series,), caption="c", table="t", **more)  # type: ignore[arg-type]
    return set(re.findall(r"<!-- (.*?) -->", plot_svg(plot)))


def test_logarithmic_axes_have_plain_labels() -> None:
    found = labels(log_x=True, log_y=True)
    assert not [label for label in found if "\\" in label or "$" in label]
    assert {"1", "10", "2e−05"} <= found


def test_steps_are_labelled_by_integers() -> None:
    found = labels()
    assert {"1", "2"} <= found
    assert not [label for label in found if re.fullmatch(r"1\.\d+", label)]


def test_categories_bands_lines_and_legend_are_drawn() -> None:
    points = Series(name="points of a", x=(0.0, 1.0), y=(0.2, 0.4), low=(0.1, 0.3), high=(0.3, 0.5), kind="points")
    line = Series(name="line of b", x=(0.0, 1.0), y=(0.3, 0.3), low=(0.2, 0.2), high=(0.4, 0.4))
    plot = Plot(
        title="t", x="", y="accuracy", series=(points, line), caption="n = 2", table="t",
        categories=("first arm", "second arm"), lines=((0.25, "guessing"),),
    )  # fmt: skip
    drawn = set(re.findall(r"<!-- (.*?) -->", plot_svg(plot)))
    assert {"first arm", "second arm", "guessing", "points of a", "line of b", "accuracy"} <= drawn
    assert "n = 2" not in drawn
    assert plot_png(plot)[:4] == b"\x89PNG"
