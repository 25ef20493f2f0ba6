"""Fonts of the system for letters that matplotlib's own font lacks, such as those of Chinese class names."""

import unicodedata
from collections.abc import Iterable
from functools import cache, lru_cache

OWN = "DejaVu Sans"  # matplotlib's: Latin, Greek, Cyrillic, Arabic and more
# The first of these that has the letters is used, otherwise any font.
_PREFERRED = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Microsoft YaHei", "WenQuanYi Zen Hei"),
    *("Arial Unicode MS", "Noto Sans Arabic", "Noto Sans Devanagari"),
)
_PLACEHOLDERS = ("last resort", "lastresort", "adobe blank", "adobeblank")  # they show a box for every letter


@lru_cache(maxsize=64)
def fallback_fonts(letters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """The families that have the letters which matplotlib's own font lacks, and the letters that no font has.

    Fonts that were installed since matplotlib last listed them are found, too; listing them takes a second, and is done
    only if no other font has a letter.
    """
    from matplotlib import font_manager

    known = font_manager.fontManager.ttflist
    own = next(font.fname for font in known if font.name == OWN and (font.style, font.weight) == ("normal", 400))
    missing = {letter for letter in letters if _is_drawn(letter)} - _among(letters, own)
    families: list[str] = []
    for look_for_new in (False, True):
        if not missing:
            break
        if look_for_new:
            _list_new_fonts()
        fonts = sorted(known, key=lambda font: (_rank(font.name), font.style != "normal", abs(int(font.weight) - 400)))
        for font in fonts:
            if missing and not any(word in font.name.casefold() for word in _PLACEHOLDERS):
                found = _among(frozenset(missing), font.fname)
                missing -= found
                families += [font.name] if found else []
    return tuple(dict.fromkeys(families)), frozenset(missing)


def _rank(name: str) -> int:
    return _PREFERRED.index(name) if name in _PREFERRED else len(_PREFERRED)


def _is_drawn(letter: str) -> bool:
    """Whether the letter needs a picture: spaces, control characters and variation selectors do not."""
    return unicodedata.category(letter) not in ("Cc", "Cf", "Zs", "Zl", "Zp") and not "\ufe00" <= letter <= "\ufe0f"


def _among(letters: Iterable[str], path: str) -> set[str]:
    """Those of the letters that a font has and can draw at any size."""
    from matplotlib.ft2font import FT2Font

    try:
        face = FT2Font(path)
    except (OSError, RuntimeError):  # not there any more, or broken
        return set()
    return {letter for letter in letters if face.get_char_index(ord(letter))} if face.scalable else set()


@cache
def _list_new_fonts() -> None:
    from matplotlib import font_manager

    known = {font.fname for font in font_manager.fontManager.ttflist}
    for path in sorted(set(font_manager.findSystemFonts()) - known):
        try:
            font_manager.fontManager.addfont(path)
        except Exception:  # a font that matplotlib cannot read raises anything
            continue
