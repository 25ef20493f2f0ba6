"""Reads the names of classes in the order of a network's outputs."""

import json
import unicodedata
from pathlib import Path
from typing import Any

from bnlab.data.split_csv import as_label
from bnlab.errors import UsageError, printable

_REMEDY = "pass a JSON file, or a file with one name a line, as classes"


def read_classes(path: Path) -> tuple[str, ...]:
    """The class names in the order of the logits, from JSON ({"0": name, ...} or a list) or from lines."""
    where = printable(path)
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UsageError(f"{where} cannot be read ({reason})", _REMEDY) from None
    try:
        names: Any = json.loads(text)
    except (ValueError, RecursionError):
        if path.suffix == ".json":
            raise UsageError(f"{where} is not JSON", 'write {"0": "daisy", ...} or ["daisy", ...]') from None
        names = None
    if isinstance(names, dict):
        for number in range(len(names)):
            if str(number) not in names:
                remedy = f"number its names 0 to {len(names) - 1}"
                raise UsageError(f"{where} has no class {number}", remedy)
        names = [names[str(number)] for number in range(len(names))]
    elif not isinstance(names, list):
        names = [line.strip() for line in text.splitlines() if line.strip()]
    labels: dict[str, int] = {}
    for number, label in enumerate(names):
        if not isinstance(label, str) or not label.strip() or any(unicodedata.category(c) == "Cs" for c in label):
            raise UsageError(f"the name of class {number} in {where} is not text", "give every class a name")
        if (first := labels.setdefault(as_label(label), number)) != number:
            problem = f"{where} has the name '{printable(label)}' for classes {first} and {number}"
            raise UsageError(problem, "give each class a different name")
    if not labels:
        raise UsageError(f"{where} names no classes", _REMEDY)
    return tuple(labels)
