"""The words outside the code are true: generated pages are current, and what the README promises is there."""

import doctest
import logging
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import bnlab
from bnlab.config import recipe_names
from tests.conftest import write_photos

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_generated_pages_are_current() -> None:
    script = (
        "import sys; sys.path.insert(0, 'docs'); import generate; print([p.name for p, t in generate.pages().items()"
    )
    script += " if p.read_text('utf-8') != t])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", "run `make docs`"


def test_every_option_in_the_readme_exists() -> None:
    commands = (ROOT / "docs" / "commands.md").read_text("utf-8")
    names = ("nets", "training", "health")
    pages = README + "".join((ROOT / "docs" / f"{name}.md").read_text("utf-8") for name in names)
    used = re.findall(r"^\$ bnlab (\w+)(.*)$", pages, re.MULTILINE)
    verbs = {
        "split",
        "train",
        "evaluate",
        "predict",
        "doctor",
        "recalibrate",
        "freeze",
        "net",
        "import",
        "machine",
        "study",
    }
    assert {verb for verb, _ in used} == verbs
    for verb, rest in used:
        section = commands.split(f"## `bnlab {verb}`")[1].split("\n## ")[0]
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in section, f"{verb} {option}"


@pytest.mark.parametrize(
    ("page", "least_blocks", "lines"), [("norm", 9, 6), ("nets", 3, 3), ("health", 2, 7), ("testing", 3, 5)]
)
def test_the_code_of_a_page_runs(
    page: str,
    least_blocks: int,
    lines: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / f"{page}.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= least_blocks
    exec("\n".join(blocks), {})  # one after the other, as the page says
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"^(?:print\(.*)?\)  # (.*)$", "\n".join(blocks), re.MULTILINE)
    assert len(printed) == len(promised) == lines
    for line, words in zip(printed, promised, strict=True):
        assert re.fullmatch(re.escape(words).replace(r"\.\.\.", "[0-9.]+"), line), line


@pytest.fixture
def flowers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder in which the examples of docs/api.md run."""
    monkeypatch.chdir(tmp_path)
    for drawn, name in {"disc": "daisy", "ring": "rose", "stripes": "tulip"}.items():
        (write_photos(tmp_path / "flowers", classes=(drawn,)) / drawn).rename(tmp_path / "flowers" / name)
    shutil.copy(tmp_path / "flowers/tulip/stripes000.png", "tulip.jpg")
    level = logging.getLogger("bnlab").level
    yield
    logging.getLogger("bnlab").setLevel(level)


@pytest.mark.parametrize("with_study", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_examples_of_the_api_run(flowers: None, with_study: bool) -> None:
    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    if not with_study:  # the shortest takes a minute
        begin, _, rest = text.partition("### `study`")
        text = begin + rest[rest.index("### `tune_allocator`") :]
    found = doctest.DocTestParser().get_doctest(text, {}, "api.md", None, 0)
    assert len(found.examples) > 25
    output: list[str] = []
    assert doctest.DocTestRunner(verbose=False).run(found, out=output.append).failed == 0, "".join(output)


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), target


def test_one_version_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == bnlab.__version__
    assert f"## {bnlab.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    pinned = re.findall(r"^([A-Za-z0-9_.-]+)==", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    known = {name.lower().replace("_", "-") for name in pinned}
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.split(r"[\[>=<]", requirement)[0].lower().replace("_", "-") for requirement in wanted} - {"bnlab"}
    assert names <= known
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text("utf-8").splitlines()


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_are_listed_where_they_are_chosen(name: str) -> None:
    assert name in (ROOT / "docs" / "commands.md").read_text("utf-8")


def test_what_the_architecture_page_names_exists() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| (?:Where|What|How).*\? \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) > 10
    for row in rows:
        names = re.findall(r"`([^`]+)`", row)
        files = [name for name in names if "/" in name or name.endswith(".py")]
        paths = [path for name in files for path in (ROOT / "src" / "bnlab" / name, ROOT / name) if path.exists()]
        assert len(paths) == len(files), row
        source = "".join(path.read_text("utf-8") for path in paths if path.is_file())
        for name in set(names) - set(files) - {"conclude"}:
            assert name.rpartition(".")[2] in source or "." in name, f"{name} is not there: {row}"
