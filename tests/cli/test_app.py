"""The program itself: help, version, and what they import."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from bnlab import __version__
from tests.conftest import Outcome

VERBS = ("split", "train", "evaluate", "predict", "demo", "doctor", "machine", "net", "import", "study")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(bnlab: Callable[..., Outcome], verb: str) -> None:
    done = bnlab(verb, "--help")
    assert done.status == 0
    assert f"Usage: bnlab {verb} [OPTIONS]" in done.out
    assert "--json" in done.out


def test_help_lists_the_verbs(bnlab: Callable[..., Outcome]) -> None:
    done = bnlab("--help")
    listed = [line.split()[0] for line in done.out.split("Commands:\n")[1].split("\n\n")[0].splitlines()]
    assert tuple(listed) == VERBS
    without = bnlab()
    assert (without.status, without.out) == (2, done.out)


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from bnlab.__main__ import main; status = main(['train', '--help']);"
        "heavy = {'torch', 'numpy', 'sklearn', 'scipy', 'matplotlib', 'PIL'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version(bnlab: Callable[..., Outcome]) -> None:
    assert bnlab("--version").out == f"bnlab {__version__}\n"
