"""Writes the reference pages from the help of the commands, the fields of the recipe and the studies.

`make docs` runs it; tests/test_docs.py checks that the pages are current.
"""

import json
from pathlib import Path
from urllib.parse import quote

import generate_api
from typer.testing import CliRunner

from bnlab.cli import app
from bnlab.config import load_settings
from bnlab.health.registry import Entry, all_checks
from bnlab.lab.experiment import SETTABLE
from bnlab.lab.splits import QUICK_PHOTOS
from bnlab.lab.study import STUDY_NAMES, find_study
from bnlab.recipe import Recipe
from bnlab.report.page import format_number

PAPER = ["inception", "bn-baseline", "bn-x5", "bn-x30", "bn-x5-sigmoid"]

HERE = Path(__file__).parent
VERBS = (
    *("split", "train", "evaluate", "predict", "doctor", "recalibrate", "freeze"),
    *("demo", "net", "import", "machine", "study"),
)


def pages() -> dict[Path, str]:
    """Each generated page and its text."""
    return {
        HERE / "commands.md": _commands(),
        HERE / "api.md": generate_api.api(),
        generate_api.KEYWORDS: generate_api.keywords(),
        HERE / "recipes.md": _recipes(),
        HERE / "studies.md": _studies(),
        HERE / "results" / "README.md": _results(),
        HERE / "checks" / "README.md": _checks(),
        **{HERE / "checks" / f"{entry.check.name}.md": _check(entry) for entry in all_checks()},
    }


def _commands() -> str:
    parts = ["# Commands\n\n`make docs` writes this page from the help of the commands.\n"]
    for verb in ("", *VERBS):
        words = [verb, "--help"] if verb else ["--help"]
        text = CliRunner().invoke(app, words, prog_name="bnlab", terminal_width=98).output
        parts.append(f"## `bnlab{f' {verb}' if verb else ''}`\n\n```text\n{text.strip()}\n```\n")
    return "\n".join(parts)


def _recipes() -> str:
    lines = [
        "# Recipes\n",
        "`make docs` writes this page from `bnlab/recipe.py`. `bnlab train --recipe` takes the name of a recipe or a",
        "YAML file of these keys, and `--set KEY=VALUE` sets any key. A dash stands for the default.\n",
        *_table(["default", "classic", "digits"], list(Recipe.model_fields), meaning=True),
        "\n## The paper's networks (sec. 4.2)\n",
        "The table shows what differs from the default. The paper's",
        "table gives the learning rates, the batch and the seven changes of BN-x5 against BN-Baseline (higher learning",
        "rate, no dropout, a fifth of the weight decay, decay six times as fast, no local response normalisation,",
        "thorough shuffling, less photometric distortion). The decay of 4% in 8 epochs is GoogLeNet's; the weight",
        "decay, the momentum and the strength of the distortions are ours.\n",
        *_table(PAPER, sorted({key for name in PAPER for key in load_settings(name).origin}), meaning=False),
    ]
    return "\n".join(lines) + "\n"


def _studies() -> str:
    parts = [
        "# Studies\n",
        "`make docs` writes this page from the studies themselves. `bnlab study NAME` measures one, `bnlab study all`",
        "measures all. Each seed has its own split into train, val and test; choices are made on val, and results are",
        "measured on test. A clause of a claim states that a number lies in a range. It holds if its 95% interval",
        "over seeds (Student's t) lies completely inside the range, does not hold if the interval lies completely",
        "outside, and is otherwise not shown. Unless DATA is already split, seeds split the same photos anew; the",
        "interval is then wider, because the training sets overlap (Nadeau & Bengio 2003). A claim holds if all its",
        "primary clauses hold, and does not hold if one of k primary clauses does not hold by an interval of",
        "100 - 5/k %.\n",
        "Guessing means to answer with the most frequent class of test each time. A network has learnt something if it",
        "is better than guessing by 10 points, or has twice the accuracy of guessing if that is less. A training that",
        "diverged counts as guessing, unless a protocol says otherwise.\n",
        "Networks are evaluated (accuracy.csv) by statistics recalibrated on 256 photos of train (full: 1,024).",
        f"A quick study takes at most {QUICK_PHOTOS:,} photos of each split of DATA, equally many of each class.\n",
        f"`--set` takes {', '.join(SETTABLE)}; a study that sets one of them itself refuses it.\n",
        "[The results of all studies](results/README.md).\n",
    ]
    for name in STUDY_NAMES:
        study = find_study(name)
        parts.append(
            f"## {study.title}: `bnlab study {name}`\n\n{study.claim} ({study.source})\n\n"
            f"*Protocol.* {study.protocol}\n\n*Rule.* {study.rule}\n"
        )
    return "\n".join(parts)


def _results() -> str:
    """The study.json files in the repository as tables, each with its hand-written note.md."""
    parts = [
        "# Results of the studies\n",
        "`make docs` writes this page from the `study.json` of each folder here, which `bnlab study` wrote. The",
        "folders hold the tables as CSV and the plots. [The protocols and rules](../studies.md).\n",
    ]
    for path in sorted((HERE / "results").glob("*/study.json")):
        found = json.loads(path.read_text("utf-8"))
        about, folder = found["environment"], path.parent.name
        machine = about["gpu"] or f"one core of {about['processor']} for each training"
        parts += [
            f"## {folder}: {found['verdict']}\n",
            f"{found['claim']} ({found['source']})\n",
            f"{found['data']}, {found['seeds']} seeds, budget {found['budget']}{_options(found['options'])}; "
            f"{found['seconds'] / 60:.0f} minutes of computing, {machine}, torch {about['versions']['torch']}, "
            f"{about['date']}.\n",
            "| clause | range | mean | interval | verdict |",
            "| --- | --- | --- | --- | --- |",
        ]
        for what, number in found["numbers"].items():
            if isinstance(number, dict):
                secondary = "" if number["decides"] else " (secondary)"
                level = "" if number["level"] == 0.95 else f" ({100 * number['level']:.1f}%)"
                cells = (
                    what + secondary,
                    f"{number['claimed']} {number['unit']}",
                    format_number(number["mean"]),
                    f"{format_number(number['low'])} to {format_number(number['high'])}{level}",
                    number["verdict"],
                )
                parts.append(f"| {' | '.join(cells)} |")
        others = {what: number for what, number in found["numbers"].items() if not isinstance(number, dict)}
        parts += ["", *(f"- {remark}." for remark in found["remarks"]), ""]
        if others:
            parts += [
                "Other numbers: "
                + "; ".join(f"{what} {format_number(number)}" for what, number in others.items())
                + ".",
                "",
            ]
        if (note := path.with_name("note.md")).exists():
            parts += [note.read_text("utf-8").strip(), ""]
        parts += [f"![{plot.stem}]({folder}/{quote(plot.name)})" for plot in sorted(path.parent.glob("*.png"))]
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _check(entry: Entry) -> str:
    source = f"src/bnlab/health/checks/{entry.file}.py"
    return f"{entry.page()}\n`make docs` writes this page from [`{source}`](../../{source}).\n"


def _checks() -> str:
    lines = [
        "# Checks of batch normalisation\n",
        "`make docs` writes this page from `bnlab/health/checks`. `bnlab doctor` makes these checks, and",
        "`bnlab doctor --explain BN102` shows the page of one. A training makes BN102, BN103, BN109 and BN110 while it",
        "runs.\n",
        "Severity: *error* is an exact fact that makes results wrong; *warn* is shown by a test and is large enough to",
        "matter; *info* is advice. A remedy is *safe* if it cannot change what was trained, *unsafe* if it may, and",
        "*display only* if the caller's code must change. *m* is a layer's momentum (the weight of the newest batch),",
        "*gamma* and *beta* are the scale and the shift that it learns.\n",
        "| id | name | severity | remedy | finds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for entry in all_checks():
        about = entry.check
        link = f"[{about.name}]({about.name}.md)"
        lines.append(
            f"| {about.id} | {link} | {about.severity} | {about.safety} | {entry.title.replace(chr(10), ' ')} |"
        )
    return "\n".join(lines) + "\n"


def _options(options: dict[str, object]) -> str:
    return "".join(f", {key} {value}" for key, value in options.items())


def _table(names: list[str], keys: list[str], *, meaning: bool) -> list[str]:
    """Recipes in columns; a dash stands for the default."""
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
        return {None: "unset", True: "yes", False: "no"}[value]
    return ", ".join(f"{number:.4g}" for number in value) if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
