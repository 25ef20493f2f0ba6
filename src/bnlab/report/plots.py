"""Plots of numbers that somebody else measured: lines with bands, and points with intervals, over any axes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bnlab.report.canvas import COLOURS, plain_labels, png, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES = ("-", "--", "-.", ":")
_MARKERS = "osD^vPX*"


@dataclass(frozen=True, kw_only=True)
class Series:
    """One thing, measured at several places."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    """and from where"""
    high: tuple[float, ...] = ()
    """to where it was, such as over seeds"""
    kind: Literal["line", "points"] = "line"
    colour: int | None = None
    """the number of its colour; series that belong together share one, and differ in their style"""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One plot, and all that has to be said beside it."""

    title: str
    x: str
    """what the axis is, with its unit"""
    y: str
    series: tuple[Series, ...]
    caption: str
    """n, seeds, and what a band is"""
    table: str
    """name of the table that its numbers stand in"""
    categories: Sequence[str] = ()
    """names of x = 0, 1, ..., where it is no number"""
    log_x: bool = False
    log_y: bool = False
    lines: tuple[tuple[float, str], ...] = ()
    """level lines: where, and what they say"""


def plot_svg(plot: Plot) -> str:
    """The plot as SVG for a page: its text has the page's colour, in light and in dark."""
    return svg(lambda figure: _draw(figure, plot), *_size(plot))


def plot_png(plot: Plot) -> bytes:
    """The plot as PNG, black on white, with its caption."""

    def draw(figure: "Figure") -> None:
        _draw(figure, plot)
        figure.supxlabel(plot.caption, fontsize=7, color="#555555")

    width, height = _size(plot)
    return png(draw, width, height + 0.25)


def _size(plot: Plot) -> tuple[float, float]:
    return max(7.2, 0.62 * len(plot.categories) + 2.4), 3.9


def _draw(figure: "Figure", plot: Plot) -> None:
    axes = figure.subplots()
    for is_log, set_scale, axis in (
        (plot.log_x, axes.set_xscale, axes.xaxis),
        (plot.log_y, axes.set_yscale, axes.yaxis),
    ):
        if is_log:
            set_scale("log")
            plain_labels(axis)
    if not plot.log_x and all(float(x).is_integer() for series in plot.series for x in series.x):
        axes.locator_params("x", integer=True)
    for level, name in plot.lines:
        axes.axhline(level, color="gray", linewidth=1, linestyle=":")
        axes.annotate(name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7,
                      color="gray")  # fmt: skip
    points = [series for series in plot.series if series.kind == "points"]
    for number, series in enumerate(plot.series):
        if series.kind == "points":
            beside = 0.0 if not plot.categories else 0.14 * (points.index(series) - (len(points) - 1) / 2)
            _points(axes, series, number, beside)
        elif series.x:
            _line(axes, series, number)
    if plot.categories:
        long = max(map(len, plot.categories)) * len(plot.categories) > 90
        places = range(len(plot.categories))
        axes.set_xticks(places, plot.categories)
        if long:
            axes.tick_params("x", labelrotation=25)
            for label in axes.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.6, len(plot.categories) - 0.4)
    axes.set_title(plot.title)
    axes.set_xlabel(plot.x)
    axes.set_ylabel(plot.y)
    axes.grid(alpha=0.25)
    if len(plot.series) > 1:
        outside = len(plot.series) > 4
        where = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)} if outside else {"loc": "best"}
        axes.legend(frameon=False, **where)


def _look(series: Series, number: int) -> tuple[str, int]:
    """Colour, and how often that colour was had before."""
    index = number if series.colour is None else series.colour
    return COLOURS[index % len(COLOURS)], (number if series.colour is not None else number // len(COLOURS))


def _line(axes: "Axes", series: Series, number: int) -> None:
    colour, round_ = _look(series, number)
    marker = "." if len(series.x) < 25 else ""
    axes.plot(series.x, series.y, color=colour, linestyle=_STYLES[round_ % 4], marker=marker, label=series.name)
    if series.low:
        axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.18, linewidth=0)


def _points(axes: "Axes", series: Series, number: int, beside: float) -> None:
    colour, _ = _look(series, number)
    places = [x + beside for x in series.x]
    down = [y - low for y, low in zip(series.y, series.low or series.y, strict=True)]
    up = [high - y for y, high in zip(series.y, series.high or series.y, strict=True)]
    axes.errorbar(
        places,
        series.y,
        yerr=[down, up],
        color=colour,
        fmt=_MARKERS[number % len(_MARKERS)],
        markersize=5,
        capsize=3,
        linewidth=1.2,
        label=series.name,
    )
