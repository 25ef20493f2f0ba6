"""Plots of measured numbers: lines with bands, and points with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bnlab.report.canvas import COLOURS, plain_labels, png, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES = ("-", "--", "-.", ":")
_MARKERS = "osD^vPX*"


@dataclass(frozen=True, kw_only=True)
class Series:
    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()  # lower end of the band or interval, such as over seeds
    high: tuple[float, ...] = ()
    kind: Literal["line", "points"] = "line"
    colour: int | None = None
    """index of its colour; series with the same colour differ in style (default: the next colour)"""


@dataclass(frozen=True, kw_only=True)
class Plot:
    title: str
    x: str  # label of the axis, with its unit
    y: str
    series: tuple[Series, ...]
    caption: str  # n, seeds, and what a band is
    table: str  # name of the table that holds its numbers
    categories: Sequence[str] = ()  # names of x = 0, 1, ..., if x is a category
    log_x: bool = False
    log_y: bool = False
    lines: tuple[tuple[float, str], ...] = ()  # horizontal lines: level and label


def plot_svg(plot: Plot) -> str:
    """The plot as SVG for a page, without its caption."""
    return svg(partial(_draw, plot), _width(plot), 3.9)


def plot_png(plot: Plot) -> bytes:
    """The plot as PNG on white, with its caption."""

    def draw(figure: "Figure") -> None:
        _draw(plot, figure)
        figure.supxlabel(plot.caption, fontsize=7, color="#555555")

    return png(draw, _width(plot), 4.15)


def _width(plot: Plot) -> float:
    return max(7.2, 0.62 * len(plot.categories) + 2.4)


def _draw(plot: Plot, figure: "Figure") -> None:
    axes = figure.subplots()
    axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y)
    if plot.log_x:
        axes.set_xscale("log")
        plain_labels(axes.xaxis)
    elif all(float(x).is_integer() for series in plot.series for x in series.x):
        axes.locator_params("x", integer=True)
    if plot.log_y:
        axes.set_yscale("log")
        plain_labels(axes.yaxis)
    for level, name in plot.lines:
        axes.axhline(level, color="gray", linewidth=1, linestyle=":")
        axes.annotate(name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7,
                      color="gray")  # fmt: skip
    points = [series for series in plot.series if series.kind == "points"]
    for number, series in enumerate(plot.series):
        offset = 0.14 * (points.index(series) - (len(points) - 1) / 2) if plot.categories and series in points else 0.0
        _draw_series(axes, series, number, offset)
    if plot.categories:
        long = max(map(len, plot.categories)) * len(plot.categories) > 90
        slanted: dict[str, Any] = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if long else {}
        axes.set_xticks(range(len(plot.categories)), plot.categories, **slanted)
        axes.set_xlim(-0.6, len(plot.categories) - 0.4)
    axes.grid()
    if len(plot.series) > 4:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    elif len(plot.series) > 1:
        axes.legend(loc="best")


def _draw_series(axes: "Axes", series: Series, number: int, offset: float) -> None:
    """Draw the series of this number; points are moved by the offset."""
    index = number if series.colour is None else series.colour
    colour = COLOURS[index % len(COLOURS)]
    if series.kind == "points":
        lengths = [np.subtract(series.y, series.low or series.y), np.subtract(series.high or series.y, series.y)]
        style: dict[str, Any] = {"fmt": _MARKERS[number % len(_MARKERS)], "markersize": 5, "capsize": 3, "lw": 1.2}
        axes.errorbar(np.add(series.x, offset), series.y, yerr=lengths, color=colour, label=series.name, **style)
    elif series.x:
        repeat = number // len(COLOURS) if series.colour is None else number
        style = {"linestyle": _STYLES[repeat % len(_STYLES)], "marker": "." if len(series.x) < 25 else ""}
        axes.plot(series.x, series.y, color=colour, label=series.name, **style)
        if series.low:
            axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.18, linewidth=0)
