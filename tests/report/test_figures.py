import io
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from bnlab.report import figures
from bnlab.report.canvas import COLOURS
from tests.classifier.test_evaluate import KNOWN, answers

ROWS = [
    {"epoch": e, "train_loss": 2 / e, "val_loss": 2.2 / e, "train_top1": 1 - 0.8 / e, "val_top1": 1 - 0.9 / e}
    for e in range(1, 6)
]


def test_each_run_has_its_colour() -> None:
    svg = figures.curves({"one": ROWS, "two": ROWS[:2]})
    assert all(colour.lower() in svg for colour in COLOURS[:2])
    assert COLOURS[2].lower() not in svg


def test_the_same_figure_gives_the_same_bytes() -> None:
    assert figures.reliability(KNOWN) == figures.reliability(KNOWN)
    assert figures.confusion_png(KNOWN) == figures.confusion_png(KNOWN)


def contrast(first: str | Sequence[float], second: str | Sequence[float]) -> float:
    """The contrast ratio of two colours, from 1 to 21 (WCAG 2.2, where text needs 4.5)."""

    def luminance(colour: str | Sequence[float]) -> float:
        channels = np.array(to_rgb(colour))  # type: ignore[arg-type]
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    darker, lighter = sorted((luminance(first), luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


def test_each_count_of_the_confusion_matrix_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """On each shade, zeros too, which are fainter than other counts."""
    drawn: list[Figure] = []

    def keep(draw: Callable[[Figure], None], width: float, height: float) -> bytes:
        draw(figure := Figure((width, height)))
        drawn.append(figure)
        return b""

    monkeypatch.setattr(figures, "png", keep)
    for wrong in range(0, 101, 2):  # photos of the first class that are classified as the second
        predicted = np.eye(3)[[1] * wrong + [0] * (100 - wrong)]
        figures.confusion_png(answers([0] * 100, predicted.tolist(), ["a", "b", "c"]))  # type: ignore[arg-type]
        axes = drawn[-1].axes[0]
        shades = axes.images[0].to_rgba(axes.images[0].get_array())[..., :3]
        assert [text.get_text() for text in axes.texts] == [str(100 - wrong), str(wrong), *["0"] * 7]
        for text in axes.texts:
            column, row = map(int, text.get_position())
            here = contrast(text.get_color(), shades[row, column])
            assert here >= 4.3, (text.get_text(), wrong, here)
            assert text.get_text() != "0" or here < 6


@pytest.mark.parametrize("names", ["abc", "百$_", ["x" * 90, "a\nb", "[red]"]])
def test_any_name_can_be_drawn(names: list[str]) -> None:
    evaluation = answers(KNOWN.targets.tolist(), KNOWN.probabilities.tolist(), names)  # type: ignore[arg-type]
    with Image.open(io.BytesIO(figures.confusion_png(evaluation))) as image:
        assert image.width < 1500


def test_many_classes_fit(tmp_path: object) -> None:
    random = np.random.default_rng(0)
    many = answers(random.integers(0, 200, 400).tolist(), random.dirichlet(np.ones(200), 400).tolist(), ["c"] * 200)  # type: ignore[arg-type]
    with Image.open(io.BytesIO(figures.confusion_png(many))) as image:
        assert image.width < 2100


@pytest.mark.parametrize("losses", [[2.0, 1.5, 1e9], [1.0, 1.0, 1.0], [1.0]])
def test_a_range_test_can_be_drawn(losses: list[float]) -> None:
    rates = [1e-5, 1e-3, 1e-1][: len(losses)]
    marks = {"suggested": 1e-3, "steepest": None}
    picture = figures.lr_range_test_png(rates, losses, losses, marks, "$a network, of 4 px")
    assert picture == figures.lr_range_test_png(rates, losses, losses, marks, "$a network, of 4 px")
    assert picture != figures.lr_range_test_png(rates, losses, losses, {"suggested": None}, "$a network, of 4 px")
