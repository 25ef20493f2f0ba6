"""The checks: that each has a file, an id, a page and both kinds of tests; how they are chosen and run."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bnlab.errors import UsageError
from bnlab.health import checks, diagnose
from bnlab.health.check import HEADINGS
from bnlab.health.evidence import PARTS, Evidence
from bnlab.health.gather import gather
from bnlab.health.registry import Entry, all_checks, chosen, find_check, run_checks

ROOT = Path(__file__).parents[2]
ENTRIES = all_checks()
IDS = [entry.check.id for entry in ENTRIES]


def test_ids_and_names_are_unique_and_in_order() -> None:
    assert len(ENTRIES) >= 2
    assert sorted(IDS) == IDS
    assert len({*IDS}) == len({entry.check.name for entry in ENTRIES}) == len(ENTRIES)


@pytest.mark.parametrize("entry", ENTRIES, ids=IDS)
def test_each_check_is_complete(entry: object) -> None:
    """A file named after the fault, a docs page with all headings, and both kinds of tests."""
    check, file = entry.check, entry.file  # type: ignore[attr-defined]
    assert re.fullmatch(r"BN[01]\d\d", check.id)
    assert check.name == file.replace("_", "-")
    assert (check.severity == "error") or check.severity in ("warn", "info")
    assert {*check.needs} <= {*PARTS}
    assert all(entry.sections[heading] for heading in HEADINGS)  # type: ignore[attr-defined]
    assert entry.title.endswith(".")  # type: ignore[attr-defined]
    assert (ROOT / "docs" / "checks" / f"{check.name}.md").is_file(), "run make docs"
    tests = (Path(__file__).parent / "checks" / f"test_{file}.py").read_text("utf-8")
    assert re.search(r"^def test_finds_", tests, re.MULTILINE)
    assert re.search(r"^def test_is_silent_", tests, re.MULTILINE)


def test_checks_are_chosen_by_id_and_name() -> None:
    assert [e.check.id for e in chosen(["bn102", "train-eval-gap"])] == ["BN101", "BN102"]
    assert "BN102" not in [e.check.id for e in chosen(ignore=["stale-statistics"])]
    assert [e.check.id for e in chosen("BN102")] == ["BN102"]
    assert "BN102" not in [e.check.id for e in chosen(ignore="BN102")]
    with pytest.raises(UsageError, match="did you mean 'stale-statistics'"):
        find_check("stale-statistic")
    with pytest.raises(UsageError, match=r"did you mean '.*' \(BN1..\)"):
        find_check("bn10")
    with pytest.raises(UsageError, match="pass one id or name, such as BN102"):
        find_check("accuracy")


def test_a_check_that_lacks_evidence_is_skipped_with_the_reason() -> None:
    findings, skipped = run_checks(Evidence(layers={}), chosen(["BN102"]))
    assert findings == ()
    assert skipped["BN102"].startswith("it needs ")


def parts_read(file: str) -> set[str]:
    """The parts whose names the source of a check, or of a check that it imports, passes to the evidence."""
    text = (Path(checks.__path__[0]) / f"{file}.py").read_text("utf-8")
    found = {*re.findall(r"""(?:\.part|\.has|parts\.get)\("(\w+)\"""", text)}
    for names in re.findall(r"from bnlab.health.checks import (.+)", text):
        found = found.union(*(parts_read(name) for name in names.split(", ")))
    return found & {*PARTS}


@pytest.mark.parametrize("entry", ENTRIES, ids=IDS)
def test_a_check_names_the_parts_that_it_reads(entry: Entry) -> None:
    """Only those are measured."""
    assert parts_read(entry.file) <= {*entry.check.needs, *entry.check.reads}


def test_only_what_the_chosen_checks_read_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    watched = {partial(seen, measured, one): parts for one, parts in gather.GATHERERS.items()}
    monkeypatch.setattr(gather, "GATHERERS", watched)
    model, images = nn.Sequential(nn.BatchNorm1d(2)).eval(), [torch.randn(4, 2)] * 2
    diagnose(model, images, select=["gamma-near-zero", "reused-layer"])
    assert measured == ["bnlab.health.gather.uses"]


def seen(measured: list[str], gatherer: Any, *arguments: Any) -> Any:
    measured.append(gatherer.__module__)
    return gatherer(*arguments)
