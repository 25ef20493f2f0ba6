import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bnlab.__main__ import main
from bnlab.commands import study as command
from bnlab.data.split_csv import read_split_csv
from bnlab.errors import DataError, UsageError
from bnlab.files import read_csv
from bnlab.lab.experiment import Experiment
from bnlab.lab.measurements import JobContext
from bnlab.lab.plots import caption, series_by_arm
from bnlab.lab.records import Results, by_seed, last
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.verdict import Evidence
from bnlab.options import StudyOptions
from bnlab.progress import NullProgress
from bnlab.report.plots import Plot
from tests.conftest import write_photos


def pretended(job: JobContext, *, gain: float) -> Results:
    return {
        "accuracy": [
            {"step": step, "test_top1": 0.5 + gain * step / 100 + job.seed / 100, "n_test": 100} for step in (1, 10)
        ]
    }


def measure(experiment: Experiment) -> Results:
    gain = float(experiment.options.get("flip", 0.9))  # any key will do to plant an answer
    return experiment.run(
        [
            experiment.measurement(pretended, seed, labels={"arm": arm}, gain=gain * (arm == "with <b>"))
            for arm in ("with <b>", "without")
            for seed in experiment.seeds
        ]
    )


def conclude(results: Results) -> Conclusion:
    rows = results["accuracy"]
    ours, theirs = (by_seed(rows, last("test_top1"), arm=arm) for arm in ("with <b>", "without"))
    values = tuple(a - b for a, b in zip(ours, theirs, strict=True))
    return Conclusion(
        evidence=(Evidence(what="it is higher", values=values, above=0.0, unit="points", resolution=1e-3),),
        plots={
            "two words": Plot(
                title="t",
                x="x",
                y="y",
                series=series_by_arm(rows, "step", "test_top1"),
                caption=caption(rows, "band"),
                table="accuracy",
            )
        },
        numbers={"a number": 1.5, "nothing": None},
        remarks=("a remark",),
    )


PLANTED = Study(
    name="planted",
    title="A planted study",
    claim="It is <so>.",
    source="Nobody 2026",
    protocol="None.",
    rule="Above 0.",
    measure=measure,
    conclude=conclude,
)


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    studies = {"planted": PLANTED, "other": Study(**{**vars(PLANTED), "name": "other"})}
    monkeypatch.setattr(command, "STUDY_NAMES", tuple(studies))
    monkeypatch.setattr(command, "find_study", lambda name: studies[name])
    monkeypatch.chdir(tmp_path)
    yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), each=40)


def options(data: Path | None, keys: Mapping[str, Any] | None = None, **more: Any) -> StudyOptions:
    return StudyOptions(**{"study": "planted", "data": data, "processes": 0, "recipe_keys": keys or {}} | more)


@pytest.mark.parametrize(("gain", "verdict"), [(0.5, "holds"), (0.0, "not shown")])
def test_a_study_leaves_a_page_tables_and_pictures(data: Path, gain: float, verdict: str) -> None:
    result = command.run(options(data, {"flip": gain}), NullProgress())
    assert repr(result) == f"<StudyResult planted: {verdict}, {result.folder}>"
    assert repr(result.reports[0]) == f"<Report planted: {verdict}, {result.folder}>"
    assert result.folder == Path("runs/study-planted")
    files = {"report.html", "study.json", "accuracy.csv", "two-words.png", "two-words-drawn.csv"}
    assert {path.name for path in result.folder.iterdir()} == files
    document = json.loads((result.folder / "study.json").read_text())
    assert document["verdict"] == verdict
    assert {key: document[key] for key in ("study", "claim", "source", "seeds", "budget", "report")} == {
        "study": "planted", "claim": "It is <so>.", "source": "Nobody 2026", "seeds": 3, "budget": "quick",
        "report": "runs/study-planted/report.html",
    }  # fmt: skip
    assert document["numbers"]["a number"] == 1.5
    assert document["numbers"]["it is higher"]["n"] == 3
    rows = list(read_csv(result.folder / "accuracy.csv"))
    assert len(rows) == 12
    assert list(rows[0]) == ["arm", "seed", "step", "test_top1", "n_test"]
    drawn = list(read_csv(result.folder / "two-words-drawn.csv"))
    assert [(row["series"], row["x"]) for row in drawn] == [
        (arm, x) for arm in ("with <b>", "without") for x in ("1", "10")
    ]
    assert float(drawn[0]["y"]) == pytest.approx(0.51 + gain / 100)
    page = result.page.read_text()
    assert "It is &lt;so&gt;." in page
    assert "with <b>" not in page
    for link in re.findall(r'<a href="([^"]+)"', page):
        assert (result.folder / link.replace("%20", " ")).exists(), link
    assert verdict in page


def test_a_second_look_costs_nothing_and_is_the_same(data: Path) -> None:
    first = command.run(options(data), NullProgress())
    before = {path.name: path.read_bytes() for path in first.folder.iterdir()}
    kept = {path.name: path.stat().st_mtime_ns for path in Path("runs/measured").glob("*.json")}
    second = command.run(options(data), NullProgress())
    assert second.folder == first.folder
    assert {path.name: path.stat().st_mtime_ns for path in Path("runs/measured").glob("*.json")} == kept
    assert {path.name: path.read_bytes() for path in first.folder.iterdir()} == before


@pytest.mark.parametrize("more", [{"recipe_keys": {"flip": 0.3}}, {"seeds": 4}, {"name": "mine"}])
def test_another_look_overwrites_nothing(data: Path, more: dict[str, Any]) -> None:
    first = command.run(options(data), NullProgress())
    before = {path.name: path.read_bytes() for path in first.folder.iterdir()}
    second = command.run(options(data, **more), NullProgress())
    assert second.folder == Path("runs") / more.get("name", "study-planted2")
    assert {path.name: path.read_bytes() for path in first.folder.iterdir()} == before


def test_a_folder_may_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured is known by what is in the photos; lists of photos hold where they were written alone."""
    command.run(options(None), NullProgress())
    kept = {path.name for path in Path("runs/measured").glob("*.json")}
    Path("runs").rename("moved")
    Path("elsewhere").mkdir()
    Path("moved").rename("elsewhere/runs")
    monkeypatch.chdir("elsewhere")
    command.run(options(None), NullProgress())
    assert {path.name for path in Path("runs/measured").glob("*.json")} == kept
    lists = [path for path in Path("runs/measured/photos").glob("*.csv") if not path.name.startswith("examined")]
    assert len(lists) == 6  # of three seeds, there and here
    assert sum(all(Path(photo.path).exists() for photo in read_split_csv(path)) for path in lists) == 3


def test_of_all_studies_those_done_are_there_when_one_is_interrupted(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(experiment: Experiment) -> Results:
        raise KeyboardInterrupt

    studies = {"planted": PLANTED, "other": Study(**{**vars(PLANTED), "name": "other", "measure": interrupted})}
    monkeypatch.setattr(command, "find_study", lambda name: studies[name])
    with pytest.raises(KeyboardInterrupt):
        command.run(options(data, study="all"), NullProgress())
    assert 'href="planted/report.html"' in Path("runs/study-all/report.html").read_text()


def test_all_studies_have_a_page_each(data: Path) -> None:
    result = command.run(options(data, study="all"), NullProgress())
    assert repr(result) == f"<StudyResult holds: {len(result.reports)}, {result.folder}>"
    page = result.page.read_text()
    for name in ("planted", "other"):
        assert f'href="{name}/report.html"' in page
        assert 'href="../report.html"' in (result.folder / name / "report.html").read_text()
    assert [study["study"] for study in result.to_json()["studies"]] == ["planted", "other"]


def test_one_seed_shows_nothing_and_says_so(data: Path) -> None:
    progress = NullProgress()
    result = command.run(options(data, {"flip": 0.5}, seeds=1), progress)
    assert str(result.reports[0].conclusion.verdict) == "not shown"
    (warning,) = progress.warnings
    assert "one seed" in warning
    assert "pass seeds=3" in warning


def test_options_without_effect_are_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = NullProgress()
    monkeypatch.setattr(command, "choose_device", lambda _: "cuda")
    monkeypatch.setattr(command, "environment", lambda _: {})
    command.run(options(data, {"steps": 3, "epochs": 2}, processes=2), progress)
    assert [warning.split()[0] for warning in progress.warnings] == ["epochs", "processes"]


def test_how_photos_are_opened_may_be_set(tmp_path: Path) -> None:
    for label, low in (("a", 0), ("b", 900)):
        (tmp_path / "deep" / label).mkdir(parents=True)
        for i in range(50):
            values = np.random.default_rng(i).integers(low, low + 100, (8, 8)).astype(np.float32)
            Image.fromarray(values).save(tmp_path / "deep" / label / f"{i}.tif")
    for keys in ({"pixel_range": 1000, "max_megapixels": 1e-6}, {}):  # no photo can be used
        with pytest.raises(DataError, match="0 usable photos"):
            command.run(options(tmp_path / "deep", keys), NullProgress())
    result = command.run(options(tmp_path / "deep", {"pixel_range": 1000}), NullProgress())
    assert (result.warnings, result.refused) == ((), ())


def test_what_cannot_be_is_refused_before_anything_is_measured(data: Path) -> None:
    for seeds in (0, 101):
        with pytest.raises(UsageError, match=rf"seeds is {seeds}: it must be (greater|less) than or equal to 1"):
            command.run(options(data, seeds=seeds), NullProgress())
    with pytest.raises(UsageError, match="measured is for measurements: pass another name"):
        command.run(options(data, name="measured"), NullProgress())
    with pytest.raises(UsageError, match=r"a recipe has no key 'stpes': did you mean 'steps'"):
        command.run(options(data, {"stpes": 3}), NullProgress())
    for key in ("network", "norm", "learning_rate", "seed"):
        with pytest.raises(UsageError, match=f"the study planted sets {key} itself: leave it out; you may set size, "):
            command.run(options(data, {key: {"network": "mlp", "norm": "none"}.get(key, 1)}), NullProgress())
    with pytest.raises(UsageError, match=r"steps 0 nothing is trained: set 1 or more, or set epochs"):
        command.run(options(data, {"steps": 0}), NullProgress())
    assert not Path("runs").exists()


def test_the_command_line(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["study", "planted", "--data", str(data), "--processes", "0", "--set", "flip=0.5"]
    assert main([*arguments, "--json", "--expect", "holds"]) == 0
    out, _ = capsys.readouterr()
    assert json.loads(out)["verdict"] == "holds"
    assert main([*arguments, "--expect", "does not hold"]) == 1
    out, err = capsys.readouterr()
    assert "planted: holds" in out
    assert "runs/study-planted/report.html shows it." in out
    assert "does not hold was expected, but planted: holds" in err
    assert main(["study", "list"]) == 0
    listed = capsys.readouterr().out
    assert "planted  A planted study\n  It is <so>. (Nobody 2026)\n" in listed
    assert main(["study", "list", "--json"]) == 0
    assert [row["study"] for row in json.loads(capsys.readouterr().out)] == ["planted", "other"]
