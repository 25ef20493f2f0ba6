"""Figures of trainings and evaluations: PNG for files, and SVG for pages."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from bnlab.classifier.evaluate import Evaluation
from bnlab.errors import printable
from bnlab.report.canvas import COLOURS, png, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, float | None]]
"""metrics by epoch; None if not measured"""

_MANY_CLASSES = 25  # names and counts of more do not fit
_DARK = 0.72  # of matplotlib's Blues: white has more contrast above, black below
_FAINT = "#667079"  # zeros, as on the pages


def curves(runs: Mapping[str, Rows]) -> str:
    """Loss and accuracy by epoch, of one run or several, as SVG."""

    def draw(figure: "Figure") -> None:
        both = figure.subplots(1, 2)
        metrics = (("loss", 1, "Loss", "nats"), ("top1", 100, "Accuracy", "%"))
        for axes, (metric, scale, title, unit) in zip(both, metrics, strict=True):
            for colour, (name, rows) in zip(COLOURS, runs.items(), strict=False):
                prefix = f"{name}, " if len(runs) > 1 else ""
                for split, style in (("train", "--"), ("val", "-")):
                    known = [(row["epoch"], row[f"{split}_{metric}"]) for row in rows]
                    epochs = [epoch or 0 for epoch, value in known if value is not None]
                    values = [scale * value for _, value in known if value is not None]
                    marker = "." if len(values) < 40 else ""
                    axes.plot(epochs, values, color=colour, linestyle=style, marker=marker, label=prefix + split)
            axes.set(title=title, xlabel="epoch", ylabel=unit)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid()
        both[0].legend()

    return svg(draw, 9.6, 3.6)


def reliability(evaluation: Evaluation) -> str:
    """Accuracy by the probability of the predicted class, as SVG."""
    return svg(partial(_reliability, evaluation), 4.4, 4.0)


def reliability_png(evaluation: Evaluation) -> bytes:
    return png(partial(_reliability, evaluation), 4.8, 4.4)


def _reliability(evaluation: Evaluation, figure: "Figure") -> None:
    axes, bins = figure.subplots(), evaluation.bins
    axes.plot([0, 100], [0, 100], color="gray", linestyle=":", label="perfectly calibrated")
    confidence, accuracy = [100 * b.confidence for b in bins], [100 * b.accuracy for b in bins]
    areas = [8 + 250 * b.n / evaluation.n for b in bins]
    axes.scatter(confidence, accuracy, areas, color=COLOURS[0], zorder=3, clip_on=False)
    axes.set(xlim=(0, 102), ylim=(0, 102), xlabel="predicted probability, %", ylabel="accuracy, %")
    axes.set_title(f"ECE {evaluation.ece:.3f}, n = {evaluation.n}")
    axes.grid()
    axes.legend(loc="upper left")


def confusion_png(evaluation: Evaluation) -> bytes:
    """The confusion matrix: rows are true classes, columns predicted ones; shading is the fraction of the row."""
    count = len(evaluation.classes)
    length = min(14.0, 3.2 + 0.45 * min(count, _MANY_CLASSES))

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        matrix = evaluation.confusion
        fraction = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        axes.imshow(fraction, cmap="Blues", vmin=0, vmax=1)
        title = f"{evaluation.split}, n = {evaluation.n}, top-1 {evaluation.top1:.1%}"
        axes.set(xlabel="predicted", ylabel="true", title=title)
        if count <= _MANY_CLASSES:
            names = [_short(name) for name in evaluation.classes]
            axes.set_xticks(range(count), names, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(count), names)
            for (i, j), n in np.ndenumerate(matrix):
                colour = "white" if fraction[i, j] > _DARK else "black" if n else _FAINT
                axes.text(j, i, str(n), ha="center", va="center", color=colour)

    return png(draw, length + 0.6, length)


def photos_png(images: Sequence[Image.Image], titles: Sequence[str], heading: str = "") -> bytes:
    """A contact sheet: photos in rows, each with its title."""
    columns = min(6, max(1, len(images)))
    rows = max(1, -(-len(images) // columns))

    def draw(figure: "Figure") -> None:
        if heading:
            figure.suptitle(heading)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid:
            axes.axis("off")
        for axes, image, title in zip(grid, images, titles, strict=False):
            axes.imshow(image)
            axes.set_title(title, fontsize=8)

    return png(draw, 2.1 * columns + 0.2, 2.5 * rows + (0.5 if heading else 0.1))


def answer_png(image: Image.Image, names: Sequence[str], probabilities: Sequence[float]) -> bytes:
    """One photo, titled by its most probable class, and a bar chart of the probabilities."""

    def draw(figure: "Figure") -> None:
        photo, bars = figure.subplots(1, 2, width_ratios=(1.3, 1))
        photo.imshow(image)
        photo.axis("off")
        photo.set_title(f"{_short(names[0])}  {probabilities[0]:.1%}", fontsize=14)
        positions = range(len(names))[::-1]
        bars.barh(positions, [100 * p for p in probabilities], color=COLOURS[0])
        bars.set_yticks(positions, [_short(name) for name in names])
        bars.set(xlim=(0, 100), xlabel="probability, %")
        bars.spines[["top", "right"]].set_visible(False)

    return png(draw, 8.4, 4.2)


def lr_range_test_png(
    rates: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    marks: Mapping[str, float | None],
    title: str,
) -> bytes:
    """Loss by learning rate: dots for batches, a line for the smoothed loss, vertical lines for `marks`."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        axes.scatter(rates, losses, 8, color="gray", alpha=0.6, linewidths=0, label="of each batch")
        axes.plot(rates, smoothed, color=COLOURS[0], linewidth=2, label="smoothed")
        known = [(name, rate) for name, rate in marks.items() if rate is not None]
        for (name, rate), style in zip(known, ("-", "--", "-.", ":"), strict=False):
            colour, linestyle = (COLOURS[1], "-") if name == "suggested" else ("gray", style)
            axes.axvline(rate, color=colour, linestyle=linestyle, label=f"{name}: {rate:.2g}")
        axes.set(xscale="log", xlabel="learning rate (logarithmic)", ylabel="training loss, nats", title=title)
        axes.xaxis.set_major_formatter("{x:g}")  # matplotlib's own labels are TeX, which is switched off
        # A diverging loss is cut off at the top: the full range would flatten the minimum before it.
        first, low = smoothed[0], min(smoothed)
        high = min(max(smoothed), first + max(6 * (first - low), abs(first) / 4))
        axes.set_ylim(low - 0.3 * (high - low) - 1e-3, high + 0.2 * (high - low) + 1e-3)
        axes.grid()
        axes.legend(loc="best")

    return png(draw, 7.2, 4.2)


def _short(name: str, length: int = 24) -> str:
    name = printable(name)
    return name if len(name) <= length else name[: length - 1] + "…"
