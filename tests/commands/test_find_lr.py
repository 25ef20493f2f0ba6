"""`bnlab train --find-lr`: files, document and suggestion."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from bnlab.training import lr_finder
from bnlab.training.state import LossNotFiniteError
from tests.conftest import QUICK, Outcome

Command = Callable[..., Outcome]


def test_finding_a_learning_rate(bnlab: Command, data: Path, tmp_path: Path) -> None:
    small = (*QUICK, "--network", "bn_mlp")
    done = bnlab("train", data, *small, "--find-lr")
    assert done.status == 0
    assert "warning: learning_rate has no effect" in done.err
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"find-lr"}
    folder = tmp_path / "runs/find-lr"
    assert {path.name for path in folder.iterdir()} == {"find-lr.png", "find-lr.csv"}
    with Image.open(folder / "find-lr.png") as picture:
        assert picture.width > 500
    with (folder / "find-lr.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "learning_rate", "loss", "smoothed_loss"]
    assert 20 < len(rows) <= 200
    assert float(rows[0]["learning_rate"]) == 1e-5

    again = bnlab("train", data, *small, "--find-lr", "--name", "twice", "--json")
    document = json.loads(again.out)
    assert (tmp_path / "runs/twice/find-lr.csv").read_bytes() == (folder / "find-lr.csv").read_bytes()
    assert (document["steps"], document["photos"], document["classes"]) == (len(rows), 24, 3)
    rate = document["suggested"]  # these shapes are learned at a rate near 0.02 (tests/training/test_run.py)
    assert 1e-3 < rate < 1
    assert done.out.splitlines()[-1].startswith("runs/find-lr/find-lr.png shows it.")
    assert f"bnlab train {data} --learning-rate {rate:g} and the other options" in done.out.splitlines()[-1]
    assert bnlab("train", data, "--find-lr", "--name", "twice").complaint.startswith("run runs/twice exists already: ")
    assert "DATA is missing" in bnlab("train", "--find-lr").complaint


def test_a_loss_that_does_not_fall_gives_no_suggestion(
    bnlab: Command, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lr_finder, "train_step", lambda *_: (torch.tensor(1.5), torch.tensor(0)))
    done = bnlab("train", data, *QUICK, "--find-lr")
    assert done.status == 0
    assert "suggested: none (the loss never fell by more than its noise" in done.out
    assert "It suggests none" in done.out.splitlines()[-1]


def test_a_loss_that_is_not_finite_from_the_start(bnlab: Command, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_finite(*_: object) -> None:
        raise LossNotFiniteError(math.nan, 0)

    monkeypatch.setattr(lr_finder, "train_step", not_finite)
    done = bnlab("train", data, *QUICK, "--find-lr")
    assert done.status == 1
    assert "not finite before any step" in done.complaint
    assert "--init" in done.complaint
