"""Writes the reference pages from the one place each text stands: the commands' help and the recipe's fields.

`make docs` writes them; tests/test_docs.py sees that they are current.
"""

import subprocess
import sys
from pathlib import Path

from bnlab.config import load_settings
from bnlab.recipe import Recipe

HERE = Path(__file__).parent
VERBS = ("split", "train", "evaluate", "predict", "demo", "net", "import")


def pages() -> dict[Path, str]:
    """Each generated page and its text."""
    return {HERE / "commands.md": _commands(), HERE / "recipes.md": _recipes()}


def _commands() -> str:
    parts = ["# Commands\n\nWritten by `make docs` from the commands' own help.\n"]
    for verb in ("", *VERBS):
        words = [sys.executable, "-m", "bnlab", *([verb] if verb else []), "--help"]
        text = subprocess.run(words, capture_output=True, text=True, check=True, env={"COLUMNS": "100"}).stdout
        parts.append(f"## `bnlab{f' {verb}' if verb else ''}`\n\n```text\n{text.strip()}\n```\n")
    return "\n".join(parts)


def _recipes() -> str:
    recipes = {name: load_settings(name) for name in ("default", "classic", "digits")}
    lines = [
        "# Recipes\n",
        "Written by `make docs` from `bnlab/config.py`. A recipe is chosen with `bnlab train --recipe`, by name or",
        "as a YAML file of these keys; any key can be set with `--set KEY=VALUE`. A dash is the default.\n",
        "| key | default | classic | digits | meaning |",
        "| --- | --- | --- | --- | --- |",
    ]
    for key, field in Recipe.model_fields.items():
        values = [_shown(getattr(recipes["default"].recipe, key))]
        values += [
            _shown(getattr(recipes[name].recipe, key)) if key in recipes[name].origin else "–"
            for name in ("classic", "digits")
        ]
        lines.append(f"| `{key}` | {' | '.join(values)} | {" ".join(str(field.description).split())} |")
    return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return ", ".join(f"{number:.4g}" for number in value) if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
