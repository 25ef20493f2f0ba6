"""Plots of measured numbers: lines with bands, and points with intervals."""

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
    """One quantity at several values of x."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    """lower end of the band or interval, such as over seeds"""
    high: tuple[float, ...] = ()
    kind: Literal["line", "points"] = "line"
    colour: int | None = None
    """index of its colour; series with the same colour differ in style (default: the next colour)"""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One plot with its labels and caption."""

    title: str
    x: str
    """label of the axis, with its unit"""
    y: str
    series: tuple[Series, ...]
    caption: str
    """n, seeds, and what a band is"""
    table: str
    """name of the table that holds its numbers"""
    categories: Sequence[str] = ()
    """names of x = 0, 1, ..., if x is a category"""
    log_x: bool = False
    log_y: bool = False
    lines: tuple[tuple[float, str], ...] = ()
    """horizontal lines: level and label"""


def plot_svg(plot: Plot) -> str:
    """The plot as SVG for a page, without its caption."""
    return svg(lambda figure: _draw(figure, plot), *_size(plot))


def plot_png(plot: Plot) -> bytes:
    """The plot as PNG on white, with its caption."""

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
            offset = 0.0 if not plot.categories else 0.14 * (points.index(series) - (len(points) - 1) / 2)
            _points(axes, series, number, offset)
        elif series.x:
            _line(axes, series, number)
    if plot.categories:
        long = max(map(len, plot.categories)) * len(plot.categories) > 90
        axes.set_xticks(range(len(plot.categories)), plot.categories)
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


def _style(series: Series, number: int) -> tuple[str, int]:
    """The colour, and how many series before have the same one."""
    index = number if series.colour is None else series.colour
    return COLOURS[index % len(COLOURS)], (number if series.colour is not None else number // len(COLOURS))


def _line(axes: "Axes", series: Series, number: int) -> None:
    colour, repeat = _style(series, number)
    marker = "." if len(series.x) < 25 else ""
    axes.plot(series.x, series.y, color=colour, linestyle=_STYLES[repeat % 4], marker=marker, label=series.name)
    if series.low:
        axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.18, linewidth=0)


def _points(axes: "Axes", series: Series, number: int, offset: float) -> None:
    colour, _ = _style(series, number)
    positions = [x + offset for x in series.x]
    down = [y - low for y, low in zip(series.y, series.low or series.y, strict=True)]
    up = [high - y for y, high in zip(series.y, series.high or series.y, strict=True)]
    axes.errorbar(
        positions,
        series.y,
        yerr=[down, up],
        color=colour,
        fmt=_MARKERS[number % len(_MARKERS)],
        markersize=5,
        capsize=3,
        linewidth=1.2,
        label=series.name,
    )
