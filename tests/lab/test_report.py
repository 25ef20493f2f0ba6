"""The files that a study writes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bnlab.files import read_csv
from bnlab.lab.experiment import Experiment
from bnlab.lab.records import Results
from bnlab.lab.report import Report, write_index, write_report
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.verdict import Evidence
from bnlab.report.plots import Plot, Series

RESULTS: Results = {"numbers": [{"seed": 0, "value": 1 / 3}, {"seed": 1, "value": 0.5, "note": "late"}]}


def conclude(results: Results) -> Conclusion:
    values = tuple(float(row["value"] or 0) for row in results["numbers"])
    bars = Series(name="all", x=(0.0, 1.0), y=values, low=(0.1, 0.2), high=(0.6, 0.7), kind="points")
    plot = Plot(title="t", x="", y="y", series=(bars,), categories=("p", "q"), caption="c", table="numbers")
    return Conclusion(evidence=(Evidence("it is positive", values, above=0.0),), plots={"two words": plot})


@pytest.fixture
def report(make_experiment: Callable[..., Experiment]) -> Report:
    texts = {"name": "planted", "title": "T", "claim": "It is <so>.", "source": "S", "protocol": "P", "rule": "R"}
    study = Study(**texts, measure=lambda experiment: RESULTS, conclude=conclude)
    return Report(study=study, experiment=make_experiment(), results=RESULTS)


def test_tables_have_every_column_and_nine_digits(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path, {})
    assert (tmp_path / "numbers.csv").read_text().splitlines() == ["seed,value,note", "0,0.333333333,", "1,0.5,late"]
    drawn = list(read_csv(tmp_path / "two-words-drawn.csv"))
    assert drawn[1] == {"series": "all", "of": "q", "y": "0.5", "low": "0.2", "high": "0.7"}


def test_the_document_names_its_page(report: Report, tmp_path: Path) -> None:
    written = write_report(report, tmp_path, {"date": "today"})
    document = json.loads((tmp_path / "study.json").read_text())
    assert document == json.loads(json.dumps(written.to_json())) | {"environment": {"date": "today"}}
    assert document["report"] == str(tmp_path / "report.html")
    assert (document["study"], document["seeds"]) == ("planted", 2)
    assert (tmp_path / "two-words.png").read_bytes().startswith(b"\x89PNG")
    assert "It is &lt;so&gt;." in (tmp_path / "report.html").read_text()


def test_the_index_links_to_the_page_of_each_study(report: Report, tmp_path: Path) -> None:
    (tmp_path / "planted").mkdir()
    environment = {"date": "2026-01-31"}
    written = write_report(report, tmp_path / "planted", environment, index="../report.html")
    write_index([written], tmp_path, environment)
    assert "planted/report.html" in (tmp_path / "report.html").read_text()
    assert "../report.html" in (tmp_path / "planted" / "report.html").read_text()
