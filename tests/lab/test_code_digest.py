from pathlib import Path
from textwrap import dedent

import pytest

from bnlab.lab import code_digest as module
from bnlab.lab.code_digest import code_digest
from bnlab.lab.studies.smoothness import train_probed
from bnlab.lab.studies.whitening import costs
from bnlab.lab.trained_network import measure_accuracy

# A small bnlab with each way in which a name can be used: of the same module, imported, re-exported by a package, as an
# attribute of a module, imported within a function, in an annotation, as a default and in a table.
FILES = {
    "lab/trained_network.py": """
        from bnlab.lab.job import Job
        from bnlab.norm import recalibrate
        from bnlab.report.plots import plot
        from bnlab.training import loop

        def measure_accuracy(job: Job):
            from bnlab.data.loader import Loader

            recalibrate()
            return loop.fit(Loader())

        def draw():
            plot()
        """,
    "lab/job.py": "class Job:\n    seed = 1\n",
    "norm/__init__.py": "from bnlab.norm.statistics import recalibrate\n",
    "norm/statistics.py": "EPS = 1e-5\n\ndef recalibrate(eps=EPS):\n    pass\n\ndef unused():\n    pass\n",
    "training/__init__.py": "",
    "training/loop.py": """
        KINDS = {}

        def step():
            if not KINDS:
                raise ValueError("no kinds")
            return 1

        def fit(loader):
            '''Trains.'''
            return step()  # once

        def unused():
            pass

        KINDS["a"] = step
        """,
    "data/loader.py": "class Loader:\n    '''Loads.'''\n    def __len__(self):\n        return 3\n",
    "report/plots.py": "def plot():\n    pass\n",
    "lab/studies/bias.py": "x = 1\n",
}


def digest(folder: Path, file: str = "", old: str = "", new: str = "") -> str:
    """The digest after one edit."""
    source = folder / f"{len(list(folder.iterdir()))}"
    for name, text in FILES.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = dedent(text)
        assert name != file or old in lines
        path.write_text(lines.replace(old, new) if name == file else lines)
    return code_digest(measure_accuracy, source=source)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("training/loop.py", "  # once", "  # as often as asked"),
        ("training/loop.py", "'''Trains.'''", "'''Trains for a while.'''"),
        ("training/loop.py", "    '''Trains.'''\n", ""),
        ("training/loop.py", '"no kinds"', '"there are no kinds"'),
        ("training/loop.py", "def unused():\n    pass", "def unused():\n    return 1"),
        ("data/loader.py", "'''Loads.'''", "'''Loads photos.'''"),
        ("norm/statistics.py", "def unused():\n    pass", ""),
        ("lab/trained_network.py", "    plot()", "    plot(1)"),
        ("report/plots.py", "pass", "return 1"),
        ("lab/studies/bias.py", "1", "2"),
    ],
)
def test_what_no_result_follows_from_keeps_the_digest(tmp_path: Path, file: str, old: str, new: str) -> None:
    assert digest(tmp_path, file, old, new) == digest(tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("norm/statistics.py", "1e-5", "1e-3"),
        ("norm/statistics.py", "EPS):\n    pass", "EPS):\n    return 1"),
        ("norm/__init__.py", "recalibrate", "unused as recalibrate"),
        ("training/loop.py", "return 1", "return 2"),
        ("training/loop.py", "if not KINDS", "if KINDS"),
        ("training/loop.py", "ValueError", "TypeError"),
        ("training/loop.py", '"a"', '"b"'),
        ("data/loader.py", "3", "4"),
        ("lab/job.py", "1", "2"),
    ],
)
def test_what_a_result_can_follow_from_changes_the_digest(tmp_path: Path, file: str, old: str, new: str) -> None:
    assert digest(tmp_path, file, old, new) != digest(tmp_path)


def test_a_training_reaches_the_layers_below_and_nothing_that_shows_or_organises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: set[str] = set()
    original = module._Module.read

    def record(self: module._Module, name: str) -> object:
        read.add(f"{self.name}.{name}")
        return original(self, name)

    monkeypatch.setattr(module._Module, "read", record)
    code_digest.__wrapped__(measure_accuracy)
    used = {"norm.layers.BatchNorm", "norm.kernels.by_batch", "nets.build.build", "training.loop.train_step"}
    assert {f"bnlab.{name}" for name in used} <= read
    organises = ("report", "commands", "cli", "config", "lab.studies", "lab.plots", "lab.report", "lab.experiment")
    assert not [name for name in read if name.startswith(tuple(f"bnlab.{part}." for part in organises))]


def test_studies_have_digests_of_their_own() -> None:
    assert len({code_digest(measure_accuracy), code_digest(train_probed), code_digest(costs)}) == 3
