"""`bnlab demo`: its promise, and what an interruption leaves."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bnlab.errors import Interrupted
from tests.conftest import Outcome

Command = Callable[..., Outcome]


def test_an_interrupted_demo_says_how_to_begin_again(bnlab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise Interrupted("x")

    monkeypatch.setattr("bnlab.training.run.train", interrupted)
    done = bnlab("demo")
    assert done.status == 130
    assert "runs/demo" in done.complaint
    assert done.complaint.endswith("bnlab demo")


@pytest.mark.slow
def test_the_demo_keeps_its_promise(bnlab: Command) -> None:
    """At least 97% of digits it never saw are correct with batch normalisation."""
    done = bnlab("demo", "--json")
    assert done.status == 0
    networks = json.loads(done.out)["twins"]
    assert networks["with BN"]["test_top1"] >= 0.97
    assert networks["with BN"]["n"] > 300
    assert {"test_top1", "diverged"} <= networks["without BN"].keys()
    assert Path("runs/demo/report.html").read_text("utf-8").count("<svg") == 2
