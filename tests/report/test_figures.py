import io

import numpy as np
import pytest
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
