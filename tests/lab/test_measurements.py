import json
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from bnlab.errors import Interrupted, RunError, StorageError
from bnlab.lab import measurements as module
from bnlab.lab.measurements import JobContext, Measurement, MeasurementResult, code_digest, exclusive, measure_all
from bnlab.lab.records import Results
from bnlab.progress import NullProgress
from bnlab.recipe import Recipe

CALLS: list[int] = []
STUDIES = [f"studies.{path.stem}" for path in Path(module.__file__).with_name("studies").glob("[a-z]*")]


def squared(job: JobContext, *, x: int) -> Results:
    CALLS.append(x)
    job.report_steps(1)
    return {"t": [{"x": x, "square": x * x / 3, "threads": torch.get_num_threads()}]}


def other(job: JobContext, *, x: int) -> Results:
    return squared(job, x=x)


def interrupted(job: JobContext, *, x: int) -> Results:
    if x == 2 and not (job.folder / "state").exists():
        (job.folder / "state").write_text("half")
        raise KeyboardInterrupt
    return squared(job, x=x)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., list[Measurement]]:
    split = tmp_path / "split.csv"
    split.write_text("path,class,split,sha256\na,b,train,1\n")
    CALLS.clear()

    def measurements(*xs: int, do: Callable[..., Results] = squared, **more: object) -> list[Measurement]:
        return [Measurement(do=do, split=split, seed=0, settings={"x": x, **more}, steps=x) for x in xs]

    return measurements


def run(measurements: list[Measurement], folder: Path, processes: int = 0) -> list[MeasurementResult]:
    return measure_all(
        measurements, folder=folder, device="cpu", processes=processes, title="test", progress=NullProgress()
    )


def test_what_was_measured_is_kept(make: Callable[..., list[Measurement]], tmp_path: Path) -> None:
    folder = tmp_path / "measured"
    first = run(make(1, 2), folder)
    assert [done.results["t"][0]["square"] for done in first] == [1 / 3, 4 / 3]
    assert first[0].results["t"][0]["threads"] == 1
    assert run(make(2, 1), folder) == first[::-1]
    assert [done.results["t"][0]["x"] for done in run(make(3, 2, 3), folder)] == [3, 2, 3]  # one measurement twice
    assert CALLS == [1, 2, 3]
    assert len(list(folder.glob("*.json"))) == 3


def test_a_key_follows_from_everything_that_the_result_follows_from(
    make: Callable[..., list[Measurement]], tmp_path: Path
) -> None:
    measurement = make(1)[0]
    keys = {measurement.key("cpu"), make(2)[0].key("cpu"), measurement.key("cuda"), make(1, do=other)[0].key("cpu")}
    keys |= {Measurement(do=squared, split=measurement.split, seed=1, settings={"x": 1}).key("cpu")}
    keys |= {make(1, recipe=Recipe(size=size))[0].key("cpu") for size in (32, 64)}
    assert len(keys) == 7
    assert (
        Measurement(do=squared, split=measurement.split, seed=0, settings={"x": 1}, labels={"arm": "a"}).key("cpu")
        in keys
    )
    measurement.split.write_text("path,class,split,sha256\nmoved/a,b,train,1\n")
    assert measurement.key("cpu") in keys  # the same photo elsewhere
    measurement.split.write_text("path,class,split,sha256\na,b,test,1\n")
    assert measurement.key("cpu") not in keys


def test_other_code_measures_anew(make: Callable[..., list[Measurement]], monkeypatch: pytest.MonkeyPatch) -> None:
    before = make(1)[0].key("cpu")
    monkeypatch.setattr(module, "code_digest", lambda module: "other")
    assert make(1)[0].key("cpu") != before


def test_processes_give_the_same(make: Callable[..., list[Measurement]], tmp_path: Path) -> None:
    done = run(make(1, 2, 4), tmp_path / "a", processes=2)
    assert [one.results["t"][0]["square"] for one in done] == [1 / 3, 4 / 3, 16 / 3]
    assert {one.results["t"][0]["threads"] for one in done} == {1}


def test_an_interruption_keeps_what_is_done_and_the_same_call_continues(
    make: Callable[..., list[Measurement]], tmp_path: Path
) -> None:
    measurements = make(1, 2, 3, do=interrupted)
    with pytest.raises(Interrupted, match="the same command continues it"):
        run(measurements, tmp_path)
    assert CALLS == [1]
    done = run(measurements, tmp_path)
    assert CALLS == [1, 2, 3]
    assert [one.results["t"][0]["x"] for one in done] == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_two_studies_do_not_measure_in_one_folder(tmp_path: Path) -> None:
    problem = r"another study measures in .*: wait for it"
    with exclusive(tmp_path / "measured"), pytest.raises(RunError, match=problem), exclusive(tmp_path / "measured"):
        pass
    with exclusive(tmp_path / "measured"):
        pass


def test_a_result_that_cannot_be_read_back_is_an_error(
    make: Callable[..., list[Measurement]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "read_json", lambda path: {})
    with pytest.raises(StorageError, match=r"\.json was just written and cannot be read: check the disk"):
        run(make(1), tmp_path)


def test_the_time_of_interrupted_attempts_counts(make: Callable[..., list[Measurement]], tmp_path: Path) -> None:
    measurement = make(2, do=interrupted)[0]
    with pytest.raises(Interrupted):
        run([measurement], tmp_path)
    spent = tmp_path / measurement.key("cpu") / "seconds.json"
    spent.write_text(json.dumps({"seconds": 100.0}))
    assert 100 < run([measurement], tmp_path)[0].seconds < 150


def test_settings_that_json_cannot_hold_are_refused(make: Callable[..., list[Measurement]]) -> None:
    with pytest.raises(TypeError, match="PosixPath is not JSON serializable"):
        make(1, path=Path("x").absolute())[0].key("cpu")


# A small bnlab with each way in which a module can be imported: by a name in it, by a package that passes a name on, as
# a module, and within a function.
FILES = {
    "lab/studies/bias.py": """
        from bnlab import __version__
        from bnlab.lab.job import Job
        from bnlab.lab.study import Study
        from bnlab.norm import recalibrate
        from bnlab.report.plots import plot
        from bnlab.training import loop

        def measure(job: Job):
            '''Trains.'''
            import bnlab.data.loader

            recalibrate()
            return loop.fit(bnlab.data.loader.Loader())  # once
        """,
    "lab/job.py": "class Job:\n    seed = 1\n    '''What follows from it.'''\n",
    "lab/study.py": "from bnlab.report import plots\n\nclass Study:\n    pass\n",
    "lab/studies/scale.py": "from bnlab.lab.studies import bias\n",
    "norm/__init__.py": "from bnlab.norm.statistics import recalibrate\n",
    "norm/statistics.py": "EPS = 1e-5\n\ndef recalibrate(eps=EPS):\n    pass\n",
    "training/__init__.py": "",
    "training/loop.py": "from bnlab.norm import statistics\n\ndef fit(loader):\n    return 1\n",
    "data/loader.py": "class Loader:\n    '''Loads.'''\n    def __len__(self):\n        return 3\n",
    "report/plots.py": "def plot():\n    pass\n",
    "__init__.py": "from bnlab.commands import train\n",
    "commands/train.py": "def run():\n    pass\n",
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
    return code_digest("bnlab.lab.studies.bias", source)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("lab/studies/bias.py", "  # once", "  # as often as asked"),
        ("lab/studies/bias.py", "'''Trains.'''", "'''Trains for a while.'''"),
        ("lab/studies/bias.py", "    '''Trains.'''\n", ""),
        ("lab/job.py", "What follows", "All that follows"),
        ("data/loader.py", "'''Loads.'''", "'''Loads photos.'''"),
        ("report/plots.py", "pass", "return 1"),
        ("lab/study.py", "pass", "x = 1"),
        ("lab/studies/scale.py", "bias", "ensemble"),
        ("commands/train.py", "pass", "return 1"),
    ],
)
def test_what_no_result_follows_from_keeps_the_digest(tmp_path: Path, file: str, old: str, new: str) -> None:
    assert digest(tmp_path, file, old, new) == digest(tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("lab/studies/bias.py", "fit", "train"),
        ("lab/job.py", "1", "2"),
        ("norm/__init__.py", "recalibrate", "measure as recalibrate"),
        ("norm/statistics.py", "1e-5", "1e-3"),
        ("training/loop.py", "return 1", "return 2"),
        ("data/loader.py", "3", "4"),
    ],
)
def test_what_a_result_can_follow_from_changes_the_digest(tmp_path: Path, file: str, old: str, new: str) -> None:
    assert digest(tmp_path, file, old, new) != digest(tmp_path)


@pytest.mark.parametrize("name", ["trained_network", *STUDIES])
def test_measurements_reach_the_layers_below_and_nothing_that_shows_or_organises(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[str] = set()
    read_bytes = Path.read_bytes
    monkeypatch.setattr(module.Path, "read_bytes", lambda path: read.add(str(path)) or read_bytes(path))
    code_digest.__wrapped__(f"bnlab.lab.{name}")
    files = {path.removeprefix(f"{module._SOURCE}/").removesuffix(".py").replace("/", ".") for path in read}
    assert len(STUDIES) >= 14
    assert files
    assert name != "trained_network" or {"norm.kernels", "nets.build", "training.loop", "lab.measurements"} <= files
    shows = ("report", "commands", "cli", "api", "serving", "lab.plots", "lab.report", "lab.experiment", "lab.study")
    assert not [file for file in files if f"{file}.".startswith(tuple(f"{part}." for part in shows))]


def test_modules_that_do_not_count_exist() -> None:
    for name in module._NOT_MEASURING:
        path = module._SOURCE / name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), name
