"""Figures of trainings and evaluations: PNG for files, and SVG for pages."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from bnlab.classifier.evaluate import Evaluation
from bnlab.errors import printable
from bnlab.report.canvas import COLOURS, png, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, float | None]]
"""metrics by epoch; None if not measured"""

_MANY_CLASSES = 25  # names and counts of more do not fit


def curves(runs: Mapping[str, Rows]) -> str:
    """Loss and accuracy by epoch, of one run or several, as SVG."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots(1, 2)
        for colour, (name, rows) in zip(COLOURS, runs.items(), strict=False):
            prefix = f"{name}, " if len(runs) > 1 else ""
            for axis, what, scale in ((axes[0], "loss", 1), (axes[1], "top1", 100)):
                for split in ("train", "val"):
                    known = [(row["epoch"], row[f"{split}_{what}"]) for row in rows]
                    points = [(epoch or 0, scale * value) for epoch, value in known if value is not None]
                    _line(axis, points, colour, prefix + split, dashed=split == "train")
        for axis, title, unit in ((axes[0], "Loss", "nats"), (axes[1], "Accuracy", "%")):
            axis.set_title(title)
            axis.set_xlabel("epoch")
            axis.set_ylabel(unit)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.25)
        axes[0].legend(frameon=False)

    return svg(draw, 9.6, 3.6)


def reliability(evaluation: Evaluation) -> str:
    """Accuracy by the probability of the predicted class, as SVG."""
    return svg(lambda figure: _reliability(figure.subplots(), evaluation), 4.4, 4.0)


def reliability_png(evaluation: Evaluation) -> bytes:
    return png(lambda figure: _reliability(figure.subplots(), evaluation), 4.8, 4.4)


def confusion_png(evaluation: Evaluation) -> bytes:
    """The confusion matrix: rows are true classes, columns predicted ones; shading is the fraction of the row."""
    count = len(evaluation.classes)
    side = min(14.0, 3.2 + 0.45 * min(count, _MANY_CLASSES))

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        matrix = evaluation.confusion
        fraction = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        axes.imshow(fraction, cmap="Blues", vmin=0, vmax=1)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.set_title(f"{evaluation.split}, n = {evaluation.n}, top-1 {evaluation.top1:.1%}")
        if count <= _MANY_CLASSES:
            names = [_short(name) for name in evaluation.classes]
            axes.set_xticks(range(count), names, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(count), names)
            for (i, j), n in np.ndenumerate(matrix):
                if n:
                    axes.text(
                        j, i, str(n), ha="center", va="center", color="white" if fraction[i, j] > 0.5 else "black"
                    )

    return png(draw, side + 0.6, side)


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
        bars.set_xlim(0, 100)
        bars.set_xlabel("probability, %")
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
            is_answer = name == "suggested"
            axes.axvline(
                rate,
                color=COLOURS[1] if is_answer else "gray",
                linestyle="-" if is_answer else style,
                label=f"{name}: {rate:.2g}",
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")  # matplotlib's own labels are TeX, which is switched off
        # A diverging loss is cut off at the top: the full range would flatten the minimum before it.
        first, low = smoothed[0], min(smoothed)
        high = min(max(smoothed), first + max(6 * (first - low), abs(first) / 4))
        axes.set_ylim(low - 0.3 * (high - low) - 1e-3, high + 0.2 * (high - low) + 1e-3)
        axes.set_xlabel("learning rate (logarithmic)")
        axes.set_ylabel("training loss, nats")
        axes.set_title(title)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, loc="best")

    return png(draw, 7.2, 4.2)


def _line(axes: "Axes", points: Sequence[tuple[float, float]], colour: str, name: str, *, dashed: bool = False) -> None:
    x, y = [x for x, _ in points], [y for _, y in points]
    axes.plot(x, y, color=colour, linestyle="--" if dashed else "-", marker="." if len(x) < 40 else "", label=name)


def _reliability(axes: "Axes", evaluation: Evaluation) -> None:
    bins = evaluation.bins
    confidence, accuracy = [100 * b.confidence for b in bins], [100 * b.accuracy for b in bins]
    axes.plot([0, 100], [0, 100], color="gray", linestyle=":", label="perfectly calibrated")
    areas = [8 + 250 * b.n / evaluation.n for b in bins]
    axes.scatter(confidence, accuracy, areas, color=COLOURS[0], zorder=3, clip_on=False)
    axes.set_xlim(0, 102)
    axes.set_ylim(0, 102)
    axes.set_xlabel("predicted probability, %")
    axes.set_ylabel("accuracy, %")
    axes.set_title(f"ECE {evaluation.ece:.3f}, n = {evaluation.n}")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="upper left")


def _short(name: str, length: int = 24) -> str:
    name = printable(name)
    return name if len(name) <= length else name[: length - 1] + "…"
