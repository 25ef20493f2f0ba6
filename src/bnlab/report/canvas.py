"""Sets up matplotlib for figures: PNG for files, and SVG in the colours of the page around it."""

import io
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colours: distinct for colour-blind readers too, and readable on white and on black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INK = "#010203"  # a placeholder for the colour of the page's text, replaced in the SVG
# Tried in order for letters that matplotlib's own font lacks.
_FONTS = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei",
    "Arial Unicode MS", "Noto Sans Arabic", "Noto Sans Devanagari",
)  # fmt: skip


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
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    installed = {font.name for font in font_manager.fontManager.ttflist}
    style: dict[Any, Any] = {
        "font.family": [name for name in _FONTS if name in installed],
        "font.size": 9,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "text.parse_math": False,  # a class may be named $5
        "svg.hashsalt": "bnlab",  # the same figure gives the same file
    }
    content = io.BytesIO()
    with mpl.rc_context(style | dict(colours)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box in the picture; the page has the letter
        figure = Figure(size, layout="constrained")
        draw(figure)
        figure.savefig(content, **options)
    return content.getvalue()
