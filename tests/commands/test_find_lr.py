from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import QUICK, Outcome

Command = Callable[..., Outcome]
VERBS = ("split", "train", "evaluate", "predict", "demo", "net", "import")


def test_finding_a_learning_rate_without_an_answer(bnlab: Command, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bnlab.training import lr_finder

    monkeypatch.setattr(lr_finder, "train_step", lambda *_: (torch.tensor(1.5), torch.tensor(0)))
    done = bnlab("train", data, *QUICK, "--find-lr")
    assert done.status == 0
    assert "suggested: none (the loss never fell by more than its noise: by 0.000, standard error 0.000)" in done.out
    assert "It suggests none: look at the curve" in done.out.splitlines()[-1]

    def not_finite(*_: object) -> None:
        raise FloatingPointError("the loss became nan", 0)

    monkeypatch.setattr(lr_finder, "train_step", not_finite)
    done = bnlab("train", data, *QUICK, "--find-lr")
    assert done.status == 1
    assert done.complaint == (
        "the loss was no number before any step, so no learning rate is to blame: "
        "check mean, std and the file of --init"
    )
