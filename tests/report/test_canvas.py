import io
import re
import xml.etree.ElementTree as ET

import matplotlib as mpl
from matplotlib.figure import Figure
from PIL import Image

from bnlab.report.canvas import plain_labels, png, svg


def draw(figure: Figure) -> None:
    axes = figure.subplots()
    axes.plot([1, 10], [2e-5, 6e-5])
    axes.set_title("$5 & λ")
    axes.set_yscale("log")
    plain_labels(axes.yaxis)


def test_svg_takes_the_text_colour_of_the_page() -> None:
    drawn = svg(draw, 3, 2)
    ET.fromstring(drawn)
    assert drawn.startswith("<svg")
    assert "currentColor" in drawn
    assert "#010203" not in drawn


def test_png_has_the_size_in_inches() -> None:
    with Image.open(io.BytesIO(png(draw, 3, 2))) as image:
        assert image.size == (420, 280)
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_labels_of_logarithmic_axes_are_plain_numbers() -> None:
    labels = set(re.findall(r"<!-- (.*?) -->", svg(draw, 3, 2)))
    assert {"2e−05", "$5 &amp; λ"} <= labels
    assert not [label for label in labels if "\\" in label]


def test_matplotlibs_settings_are_restored() -> None:
    before = dict(mpl.rcParams)
    svg(draw, 3, 2)
    assert dict(mpl.rcParams) == before
