import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Outcome

Command = Callable[..., Outcome]
VERBS = ("split", "train", "evaluate", "predict", "demo", "net", "import")


def test_an_interrupted_demo_says_how_to_begin_anew(bnlab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from bnlab.errors import Interrupted

    def interrupted(*_: object, **__: object) -> None:
        raise Interrupted("x")

    monkeypatch.setattr("bnlab.training.run.train", interrupted)
    done = bnlab("demo")
    assert (done.status, done.complaint) == (
        130, "the demo was interrupted, and leaves runs/demo; begin it anew with: bnlab demo",
    )  # fmt: skip


@pytest.mark.slow
def test_the_demo_keeps_its_promise(bnlab: Command) -> None:
    """At least 97% on digits it never saw, in at most 90 seconds on two cores."""
    began = time.monotonic()
    done = bnlab("demo", "--json")
    assert done.status == 0
    assert time.monotonic() - began < 90
    twins = json.loads(done.out)["twins"]
    assert twins["with BN"]["test_top1"] >= 0.97
    assert twins["with BN"]["n"] > 300
    assert {"test_top1", "diverged"} <= twins["without BN"].keys()
    assert Path("runs/demo/report.html").read_text("utf-8").count("<svg") == 2
