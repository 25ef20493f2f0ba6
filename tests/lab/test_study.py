import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from bnlab.errors import UsageError
from bnlab.lab import study as module
from bnlab.lab.study import STUDY_NAMES, Conclusion, Study, find_study
from bnlab.lab.verdict import Evidence, Verdict
from bnlab.report.plots import Plot, Series


def test_studies_are_found_by_name() -> None:
    files = {path.stem for path in (Path(module.__file__).parent / "studies").glob("[a-z]*")}
    assert {name.replace("-", "_") for name in STUDY_NAMES} == files
    for name in STUDY_NAMES:
        assert find_study(name).name == name
    with pytest.raises(UsageError, match="no study is called 'batchsize': did you mean 'batch-size'"):
        find_study("batchsize")


def test_no_study_imports_from_another() -> None:
    studies = Path(module.__file__).parent / "studies"
    files = list(studies.rglob("*.py"))
    assert len(files) > len(STUDY_NAMES)
    for path in files:
        own = path.relative_to(studies).parts[0]
        imported = set(re.findall(r"bnlab\.lab\.studies\.(\w+)", path.read_text("utf-8")))
        assert imported <= {own}, path


def test_line_breaks_of_the_source_code_are_not_part_of_a_text() -> None:
    texts = dict.fromkeys(("claim", "source", "protocol", "rule"), "one\n    two")
    study = Study(
        name="a", title="A", measure=lambda _: {}, conclude=lambda _: Conclusion(evidence=(), plots={}), **texts
    )
    assert {getattr(study, key) for key in texts} == {"one two"}


def test_intervals_are_drawn_again_when_seeds_overlap() -> None:
    def plots(evidence: Sequence[Evidence]) -> dict[str, Plot]:
        low, high = evidence[0].interval
        series = Series(name="x", x=(0.0,), y=(evidence[0].mean,), low=(low,), high=(high,))
        return {"interval": Plot(title="t", x="x", y="y", series=(series,), caption="c", table="t")}

    evidence = Evidence(what="it is more", values=(1.0, 1.4, 1.2), above=0.0)
    conclusion = Conclusion(evidence=(evidence,), plots={}, intervals=plots, numbers={"n": math.inf, "none": None})
    overlapping = conclusion.with_overlap(2.0)
    assert (conclusion.verdict, overlapping.verdict) == (Verdict.HOLDS, Verdict.NOT_SHOWN)
    assert conclusion.plots["interval"].series[0].low[0] > overlapping.plots["interval"].series[0].low[0]
    document = conclusion.to_json()
    assert (document["n"], document["none"], document["it is more"]["decides"]) == (None, None, True)
