"""The verbs machine, net, import and study: what they pass to their commands, and how they end."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bnlab.cli import render
from bnlab.commands import import_weights, machine, net, study
from bnlab.errors import UsageError
from tests.conftest import Outcome

Command = Callable[..., Outcome]


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The options that the commands get; each command then refuses them."""
    options: list[Any] = []

    def refuse(given: Any, progress: object) -> None:
        options.append(given)
        raise UsageError("seen", "stop here")

    for command in (machine, net, import_weights, study):
        monkeypatch.setattr(command, "run", refuse)
    return options


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("machine --device cpu", {"device": "cpu"}),
        (
            "net mlp --size 64 --classes 7 --set width=2",
            {"name": "mlp", "size": 64, "classes": 7, "recipe_keys": {"width": 2}},
        ),
        ("net mlp --all", {"name": "mlp", "size": 224, "classes": 1000}),
        ("import w.pt --output c.safetensors --format bnlab", {"file": Path("w.pt"), "format": "bnlab"}),
        (
            "study bias --seeds 5 --budget full --set size=32",
            {"study": "bias", "seeds": 5, "recipe_keys": {"size": 32}},
        ),
    ],
)
def test_options_reach_the_command(bnlab: Command, passed: list[Any], line: str, fields: dict[str, object]) -> None:
    done = bnlab(*line.split())
    assert (done.status, done.complaint, len(passed)) == (2, "seen: stop here", 1)
    assert {name: getattr(passed[0], name) for name in fields} == fields


@pytest.mark.parametrize("option", ["--all", "--auxiliary", "--size 64", "--set width=2"])
def test_options_of_a_network_need_its_name(bnlab: Command, passed: list[Any], option: str) -> None:
    done = bnlab("net", *option.split())
    assert (done.status, passed) == (2, [])
    assert "pass the name of a network: see `bnlab net --help`" in done.complaint


@pytest.mark.parametrize("option", ["--seeds 5", "--budget full", "--expect holds", "--set size=32"])
def test_the_list_of_studies_takes_no_other_options(bnlab: Command, passed: list[Any], option: str) -> None:
    done = bnlab("study", "list", *option.split())
    assert (done.status, passed) == (2, [])
    assert "pass the name of a study" in done.complaint


@pytest.mark.parametrize(
    ("expect", "verdicts", "status"),
    [
        (None, {"bias": "not shown"}, 0),
        ("holds", {"bias": "holds", "placement": "holds"}, 0),
        ("holds", {"bias": "holds", "placement": "not shown"}, 1),
        ("does not hold", {"bias": "holds"}, 1),
    ],
)
def test_another_verdict_than_expected_is_status_1(
    bnlab: Command, monkeypatch: pytest.MonkeyPatch, expect: str | None, verdicts: dict[str, str], status: int
) -> None:
    reports = [
        SimpleNamespace(study=SimpleNamespace(name=name), conclusion=SimpleNamespace(verdict=verdict))
        for name, verdict in verdicts.items()
    ]
    result = SimpleNamespace(reports=reports, page=Path("runs/x/report.html"), to_json=dict)
    monkeypatch.setattr(study, "run", lambda options, progress: result)
    monkeypatch.setattr(render, "study_table", lambda result: "table")
    done = bnlab("study", "all", *(["--expect", expect] if expect else []))
    assert done.status == status
    assert "runs/x/report.html shows it." in done.out
    for name, verdict in verdicts.items():
        assert (f"{name}: {verdict}" in done.err) == (expect is not None and verdict != expect)
