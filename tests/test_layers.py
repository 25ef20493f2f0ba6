"""Rules of structure: imports go down only, and packages on one layer do not import each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "bnlab"
LAYERS = (
    {
        "ground": (
            *("errors", "progress", "files", "recipe", "config", "no_effect", "runs", "machine", "options"),
            *("recipes", "streams", "keywords", "signatures"),
        ),
        "norm": ("norm",),
    },
    {"nets": ("nets",), "data": ("data",)},
    {"classifier": ("classifier",), "health": ("health",)},
    {"training": ("training",), "report": ("report",), "testing": ("testing",)},
    {"lab": ("lab",)},
    {"commands": ("commands",)},
    {"top": ("cli", "api", "__main__", "__init__")},
)
PLACE = {
    name: (layer, package)
    for layer, packages in enumerate(LAYERS)
    for package, names in packages.items()
    for name in names
}
FILES = sorted(PACKAGE.rglob("*.py"))


def place(path: Path) -> tuple[int, str]:
    return PLACE[path.relative_to(PACKAGE).parts[0].removesuffix(".py")]


def imported(path: Path) -> list[str]:
    """The parts of bnlab a file imports, wherever in the file."""
    names = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} has a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in names if name.startswith("bnlab.") and name != "bnlab.__version__"]


def test_every_file_has_a_place() -> None:
    assert len(FILES) > 30
    for path in FILES:
        place(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    layer, package = place(path)
    for name in imported(path):
        other_layer, other_package = PLACE[name.split(".")[1]]
        assert other_layer < layer or other_package == package, f"{path.name} on layer {layer} imports {name}"


def test_commands_do_not_know_each_other() -> None:
    for path in (PACKAGE / "commands").glob("*.py"):
        assert not [name for name in imported(path) if name.startswith("bnlab.commands.")], path.name


def test_files_are_of_a_size_to_read() -> None:
    """More than 330 lines usually hold two concepts; recalibration is one, from the batches to the buffers."""
    long = [path.name for path in FILES if len(path.read_text("utf-8").splitlines()) > 330]
    assert long == ["recalibrate.py"]


def test_each_file_has_a_test_file_of_its_name() -> None:
    """That of a study in a folder is named after the study, those of its helpers after themselves."""
    tests = {path.name for path in Path(__file__).parent.rglob("test_*.py")}
    for path in FILES:
        name = path.parent.name if path.name == "study.py" and path.parent.parent.name == "studies" else path.stem
        assert f"test_{name.strip('_')}.py" in tests or name == "__init__", f"{path} has no tests"


def test_norm_is_of_use_without_the_rest() -> None:
    """It imports torch and the standard library alone."""
    for path in (PACKAGE / "norm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                known = module.split(".")[0] in sys.stdlib_module_names | {"torch"} or module.startswith("bnlab.norm")
                assert known, f"{path.name} imports {module}"


def test_light_packages_import_no_torch() -> None:
    modules = "errors files recipe config runs machine progress data.preprocess data.scan data.duplicates data.split"
    modules += " data.dataset"
    names = [f"bnlab.{name}" for name in modules.split()] + ["bnlab", "bnlab.api", "bnlab.cli", "bnlab.commands.split"]
    script = f"import sys, {', '.join(names)}\nprint(sorted({{'torch', 'sklearn', 'matplotlib'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
