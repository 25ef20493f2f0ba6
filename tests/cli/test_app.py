import subprocess
import sys
from collections.abc import Callable

import pytest

from bnlab import __version__
from tests.conftest import Outcome

Command = Callable[..., Outcome]
VERBS = ("split", "train", "evaluate", "predict", "demo", "net", "import")


@pytest.mark.parametrize("arguments", [(), ("--help",), *((verb, "--help") for verb in VERBS)])
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    script = (
        "import sys; from bnlab.__main__ import run; status = run(sys.argv[1:]);"
        "heavy = {'torch', 'numpy', 'sklearn', 'scipy', 'matplotlib', 'PIL'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == (0 if arguments else 2), done.stderr
    assert "Usage: bnlab" in done.stdout


def test_version(bnlab: Command) -> None:
    assert bnlab("--version").out == f"bnlab {__version__}\n"
