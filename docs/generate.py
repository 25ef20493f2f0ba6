"""Writes the reference pages from the one place each text stands: the commands' help and the recipe's fields.

`make docs` writes them; tests/test_docs.py sees that they are current.
"""

import os
import subprocess
import sys
from pathlib import Path

from bnlab.config import load_settings
from bnlab.recipe import Recipe

PAPER = ["inception", "bn-baseline", "bn-x5", "bn-x30", "bn-x5-sigmoid"]

HERE = Path(__file__).parent
VERBS = ("split", "train", "evaluate", "predict", "demo", "net", "import", "machine", "study")


def pages() -> dict[Path, str]:
    """Each generated page and its text."""
    return {HERE / "commands.md": _commands(), HERE / "recipes.md": _recipes()}


def _commands() -> str:
    parts = ["# Commands\n\nWritten by `make docs` from the commands' own help.\n"]
    for verb in ("", *VERBS):
        words = [sys.executable, "-m", "bnlab", *([verb] if verb else []), "--help"]
        text = subprocess.run(
            words, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "100"}
        ).stdout
        parts.append(f"## `bnlab{f' {verb}' if verb else ''}`\n\n```text\n{text.strip()}\n```\n")
    return "\n".join(parts)


def _recipes() -> str:
    lines = [
        "# Recipes\n",
        "Written by `make docs` from `bnlab/recipe.py`. A recipe is chosen with `bnlab train --recipe`, by name or",
        "as a YAML file of these keys; any key can be set with `--set KEY=VALUE`. A dash is the default.\n",
        *_table(["default", "classic", "digits"], list(Recipe.model_fields), meaning=True),
        "\n## The paper's networks (sec. 4.2)\n",
        "What differs from the default; `variant`, `width` and the other keys of a network are its own. The paper's",
        "table gives the learning rates, the batch and the seven changes of BN-x5 against BN-Baseline (higher learning",
        "rate, no dropout, a fifth of the weight decay, decay six times as fast, no local response normalisation,",
        "thorough shuffling, less photometric distortion). The decay of 4% in 8 epochs is GoogLeNet's; the weight",
        "decay, the momentum and the strength of the distortions are ours.\n",
        *_table(PAPER, sorted({key for name in PAPER for key in load_settings(name).origin}), meaning=False),
    ]
    return "\n".join(lines) + "\n"


def _table(names: list[str], keys: list[str], *, meaning: bool) -> list[str]:
    """Recipes side by side; a dash is the default."""
    recipes = {name: load_settings(name) for name in names}
    titles = ["key", *names] + ["meaning"] * meaning
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for key in keys:
        cells = [
            _shown(getattr(settings.recipe, key)) if key in settings.origin or name == "default" else "–"
            for name, settings in recipes.items()
        ]
        cells += [" ".join(str(Recipe.model_fields[key].description).split())] * meaning
        lines.append(f"| `{key}` | {' | '.join(cells)} |")
    return lines


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return ", ".join(f"{number:.4g}" for number in value) if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
