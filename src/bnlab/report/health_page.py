"""The page of a diagnosis: accuracy by statistics, and each finding with its numbers and a picture."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from bnlab.health.check import Finding
from bnlab.health.evidence import LayerEvidence
from bnlab.health.repair import Repaired
from bnlab.health.report import Report
from bnlab.report.canvas import COLOURS, svg
from bnlab.report.page import format_number, public_path, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KINDS = {"running": "running", "batch": "batch", "recalibrated": "recalibrated"}


def diagnosis_page(report: Report, model: str, data: str, split: str, repaired: Repaired | None = None) -> str:
    """HTML, complete in itself; with `repaired`, also what was repaired."""
    layers = report.evidence.layers
    pictures = {}
    for finding in report.findings:
        shown = next((layers[name] for name in finding.layers if name in layers), None)
        pictures[finding.key()] = layer_picture(shown) if shown is not None and _measured(shown) else ""
    return render(
        "diagnosis.html",
        title=f"Diagnosis of {public_path(model)}",
        report=report,
        data=public_path(data),
        split=split,
        accuracy=accuracy_picture(report),
        pictures=pictures,
        numbers=_numbers,
        repairs=[] if repaired is None else str(repaired).splitlines(),
    )


def accuracy_picture(report: Report) -> str:
    """Accuracy, or the caller's metric, by each kind of statistics, as SVG; empty without labels."""
    values = {_KINDS[key]: value for key, value in report.accuracy.items() if value is not None}
    if not values:
        return ""
    scale = 100 if report.is_accuracy else 1

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        positions = range(len(values))[::-1]
        bars = axes.barh(positions, [scale * value for value in values.values()], color=COLOURS[0], height=0.6)
        axes.bar_label(bars, fmt="{:.1f}%" if report.is_accuracy else "{:.4g}", padding=4)
        axes.set_yticks(positions, list(values))
        axes.set(xlabel="accuracy, %" if report.is_accuracy else "mean of the metric")
        if report.is_accuracy:
            axes.set_xlim(0, 112)
            axes.set_xticks(range(0, 101, 20))
        axes.spines[["top", "right"]].set_visible(False)

    return svg(draw, 6.4, 0.7 + 0.42 * len(values))


def layer_picture(layer: LayerEvidence) -> str:
    """Running statistics of each channel against those measured on the images, as SVG."""
    return svg(partial(_draw_layer, layer), 8.6, 3.7)


def _draw_layer(layer: LayerEvidence, figure: "Figure") -> None:
    sample = layer.batch or layer.evaluation
    assert sample is not None and layer.running_mean is not None and layer.running_variance is not None
    pairs = (
        ("mean", sample.mean, layer.running_mean),
        ("standard deviation", np.sqrt(sample.variance), np.sqrt(layer.running_variance.clip(min=0))),
    )
    figure.suptitle(f"{layer.name or 'the model'}: one dot for each of {layer.channels} channels")
    for axes, (name, measured, running) in zip(figure.subplots(1, 2), pairs, strict=True):
        finite = np.isfinite(measured) & np.isfinite(running)
        low = float(min(measured[finite].min(initial=0), running[finite].min(initial=0)))
        high = float(max(measured[finite].max(initial=0), running[finite].max(initial=0))) or 1.0
        axes.plot([low, high], [low, high], color="gray", linestyle=":", label="equal")
        axes.scatter(measured[finite], running[finite], 14, color=COLOURS[0], alpha=0.8, linewidths=0)
        axes.set(xlabel=f"{name} measured on the images", ylabel=f"running {name}")
        axes.grid()
    figure.axes[0].legend(loc="upper left")


def _measured(layer: LayerEvidence) -> bool:
    return layer.usable and (layer.batch or layer.evaluation) is not None


def _numbers(finding: Finding) -> Sequence[tuple[str, str]]:
    """The numbers of a finding as text, by their names."""
    rows = []
    for name, value in finding.numbers.items():
        if isinstance(value, float):
            rows.append((name.replace("_", " "), format_number(value)))
        elif isinstance(value, (int, str)) or value is None:
            rows.append((name.replace("_", " "), "–" if value is None else str(value)))
    return rows
