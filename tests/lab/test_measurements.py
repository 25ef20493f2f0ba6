import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bnlab.errors import Interrupted, RunError, StorageError
from bnlab.lab import measurements as module
from bnlab.lab.measurements import JobContext, Measurement, MeasurementResult, exclusive, measure_all
from bnlab.lab.records import Results
from bnlab.progress import NullProgress
from bnlab.recipe import Recipe

CALLS: list[int] = []


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
    monkeypatch.setattr(module, "code_digest", lambda *functions: "other")
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
    with pytest.raises(TypeError, match="settings hold a PosixPath"):
        make(1, path=Path("x").absolute())[0].key("cpu")
