import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

from bnlab.report import fonts
from bnlab.report.canvas import png, svg
from bnlab.report.fonts import OWN, fallback_fonts


def make_font(path: Path, name: str, letters: str) -> Path:
    """A font in which each of these letters is a square."""
    pen = TTGlyphPen(None)
    for step, point in enumerate(((0, 0), (0, 900), (900, 900), (900, 0))):
        (pen.lineTo if step else pen.moveTo)(point)
    pen.closePath()
    glyphs = [".notdef", *(f"letter{i}" for i in range(len(letters)))]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap({ord(letter): glyph for letter, glyph in zip(letters, glyphs[1:], strict=True)})
    builder.setupGlyf(dict.fromkeys(glyphs, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": name, "styleName": "Regular", "psName": name.replace(" ", "")})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The fonts of a system, which matplotlib has not listed yet; at first none."""
    own = [font for font in font_manager.fontManager.ttflist if font.name in (OWN, "Last Resort High-Efficiency")]
    found: list[str] = []
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: found)
    fallback_fonts.cache_clear()
    fonts._list_new_fonts.cache_clear()
    yield found
    fallback_fonts.cache_clear()
    fonts._list_new_fonts.cache_clear()


def draw(figure: Figure) -> None:
    axes = figure.subplots()
    axes.set_title("\u767e\u5408")
    axes.set_xticks(range(2), ["\u767e", "\u83ca x"], rotation=45)


def test_the_fonts_that_have_the_letters_are_found(system: list[str], tmp_path: Path) -> None:
    (tmp_path / "broken.ttf").write_text("text")
    system += [str(tmp_path / "broken.ttf"), str(tmp_path / "gone.ttf")]
    system += [str(make_font(tmp_path / f"{name}.ttf", name, letters)) for name, letters in (
        ("Aaa", "x"), ("Bbb", "\u767e"), ("Ccc", "\u767e\u5408"), ("Noto Sans CJK JP", "\u83ca"),
    )]  # fmt: skip
    assert fallback_fonts(frozenset("lily \u03b1\u0416\n")) == ((), frozenset())
    assert fallback_fonts(frozenset("x\u767e\u5408\u83ca\ufe0f")) == (("Noto Sans CJK JP", "Bbb", "Ccc"), frozenset())
    assert fallback_fonts(frozenset("\u83ca\u2fff\udce9")) == (("Noto Sans CJK JP",), frozenset("\u2fff\udce9"))


def test_a_figure_draws_them(system: list[str], tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    system.append(str(make_font(tmp_path / "han.ttf", "Han", "\u767e\u5408\u83ca")))
    drawn = svg(draw, 3, 2)
    assert len(set(re.findall(r'id="(Han-\w+)"', drawn))) == 3
    assert 'id="DejaVuSans-' in drawn
    assert not recwarn.list


def test_letters_that_no_font_has_are_escaped(system: list[str], recwarn: pytest.WarningsRecorder) -> None:
    drawn = svg(draw, 3, 2)
    for label in ("\\u767e\\u5408", "\\u767e", "\\u83ca x"):
        assert f"<!-- {label} -->" in drawn
    with Image.open(io.BytesIO(png(draw, 3, 2))) as image:
        assert image.size == (420, 280)
    assert not recwarn.list
