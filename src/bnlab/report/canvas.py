"""Sets up matplotlib for figures: PNG for files, and SVG in the colours of the page around it."""

import io
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from bnlab.report.fonts import OWN, fallback_fonts

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.text import Text

# Okabe and Ito's colours: distinct for colour-blind readers too, and readable on white and on black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LONGEST = 48  # characters of a line whose letters are written as numbers
_INK = "#010203"  # a placeholder for the colour of the page's text, replaced in the SVG


def svg(draw: Callable[["Figure"], None], width: float, height: float) -> str:
    """What `draw` draws as SVG, `width` x `height` inches, with text in the colour of the page around it."""
    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    size, colours = (width, height), dict.fromkeys(ink, _INK)
    content = _saved(draw, size, colours, format="svg", transparent=True, metadata={"Date": None})
    text = content.decode("utf-8")
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def png(draw: Callable[["Figure"], None], width: float, height: float) -> bytes:
    """What `draw` draws as PNG on white, `width` x `height` inches."""
    return _saved(draw, (width, height), {}, format="png", dpi=140)


def plain_labels(axis: "Axis") -> None:
    """Label a logarithmic axis as 0.01 or 1e−05: matplotlib's own labels are TeX, which is switched off here.

    Ticks between powers of ten are labelled if the axis spans hardly two powers.
    """
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}".replace("-", "−") if super().__call__(x, pos) else ""

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain(minor_thresholds=(1, 0.4)))


def _saved(
    draw: Callable[["Figure"], None], size: tuple[float, float], colours: Mapping[str, str], **options: Any
) -> bytes:
    """The file of a figure; matplotlib's settings are restored afterwards."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.family": [OWN],
        "font.size": 9,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "text.parse_math": False,  # a class may be named $5
        "svg.hashsalt": "bnlab",  # the same figure gives the same file
    }

    def drawn() -> "Figure":
        figure = Figure(size, layout="constrained")
        draw(figure)
        return figure

    content = io.BytesIO()
    with mpl.rc_context(style | dict(colours)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # such as an invisible mark
        figure = drawn()
        families, unknown = fallback_fonts(frozenset("".join(text.get_text() for text in _texts(figure))))
        if families:
            mpl.rcParams["font.family"] = [OWN, *families]
            figure = drawn()  # a text takes its fonts when it is made
        if unknown:
            _escape(figure, unknown)
        figure.savefig(content, **options)
    return content.getvalue()


def _texts(figure: "Figure") -> "list[Text]":
    """All texts of the figure, with the labels of its axes up to date."""
    from matplotlib.text import Text

    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_ticklabels(which="both")
    return figure.findobj(Text)


def _escape(figure: "Figure", letters: frozenset[str]) -> None:
    """Write letters that no font has as numbers, such as `\\u767e`: boxes would all look the same."""

    def escaped(text: str) -> str:
        if letters.isdisjoint(text):
            return text
        lines = "".join(c.encode("unicode_escape").decode("ascii") if c in letters else c for c in text).split("\n")
        return "\n".join(line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…" for line in lines)

    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            names = [label.get_text() for label in axis.get_ticklabels()]
            if any(escaped(name) != name for name in names):
                axis.set_ticklabels([escaped(name) for name in names])
    for text in _texts(figure):
        text.set_text(escaped(text.get_text()))
