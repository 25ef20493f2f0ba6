"""`bnlab doctor` on classifiers and on networks of the caller's own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bnlab.classifier.file import CARD_KEY, load_network, save_classifier
from tests.conftest import Outcome

Run = Callable[..., Outcome]
FAST = ("--workers", 0, "--batch-size", 8)
CODE = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 3))

def needs(width): ...

def broken():
    raise RuntimeError("no such luck")

def text():
    return "text"

two = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "own_net.py").write_text(CODE)
    return tmp_path / "own_net.py"


def test_a_classifier_is_diagnosed_and_files_are_written(bnlab: Run, run_copy: Path, data: Path) -> None:
    done = bnlab("doctor", run_copy, "--data", data, *FAST, "--json")
    assert done.status in (0, 1), done.err
    document = json.loads(done.out)
    assert document["model"] == str(run_copy / "best.safetensors")
    assert document["images"] == 12
    assert {*document["accuracy"]} == {"running", "batch", "recalibrated"}
    assert json.loads(Path("runs/doctor/diagnosis.json").read_text())["findings"] == document["findings"]
    page = Path("runs/doctor/report.html").read_text()
    assert "Diagnosis of" in page
    assert "<svg" in page


def spoil(file: Path) -> None:
    """Put the running statistics of a classifier file at 0 and 1."""
    network, card = load_network(file)
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.reset_running_stats()
            assert layer.running_mean is not None
            layer.running_mean += 5
    save_classifier(file, network, card)


def test_stale_statistics_fail_and_a_baseline_knows_them(bnlab: Run, run_copy: Path, photos: Path) -> None:
    spoil(run_copy / "best.safetensors")
    done = bnlab("doctor", run_copy, "--data", photos, *FAST)
    assert done.status == 1
    assert "BN101 train-eval-gap" in done.out
    again = bnlab("doctor", run_copy, "--data", photos, *FAST, "--baseline", "runs/doctor/diagnosis.json")
    assert again.status == 0
    assert "of the baseline not shown" in again.out
    only = bnlab("doctor", run_copy, "--data", photos, *FAST, "--select", "gamma-near-zero", "--fail-on", "error")
    assert only.status == 0
    assert "BN101" not in only.out


def test_a_network_of_the_callers_own_with_weights(bnlab: Run, code: Path, photos: Path, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    weights = {("5" + name[1:] if name[0] == "4" else name): value for name, value in network.state_dict().items()}
    save_file(weights, tmp_path / "w.safetensors")
    done = bnlab(
        "doctor", "own_net.py:make", "--weights", "w.safetensors", "--data", photos, "--size", 24, *FAST, "--json"
    )
    assert done.status in (0, 1), done.err
    assert json.loads(done.out)["images"] == 36
    assert load_file(tmp_path / "w.safetensors").keys() == weights.keys()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["own_net.py:needs"], ["width"]),
        (["own_net.py:broken"], ["RuntimeError", "no such luck"]),
        (["own_net.py:text"], ["str"]),
        (["own_net.py:two", "--size", "2"], ["2 outputs", "3 classes"]),
        (["own_net.py:nothing"], ["nothing"]),
        (["own_net.py"], ["which network to build", "own_net.py:NAME"]),
        (["missing.safetensors"], ["missing.safetensors"]),
        (["own_net.py:make", "--weights", "bad.safetensors"], ["bad.safetensors"]),
        (["own_net.py:make", "--weights", "short.safetensors"], ["1.weight"]),
        (["own_net.py:make", "--mean", "a,b,c"], ["mean 'a,b,c'"]),
        (["own_net.py:make", "--std", "0,1,1"], ["std '0,1,1'"]),
        (["own_net.py:make", "--select", "BN999"], ["BN999"]),
        (["own_net.py:make", "--baseline", "none.json"], ["none.json"]),
        (["own_net.py:make", "--baseline", "own_net.py"], ["not a diagnosis"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    bnlab: Run, code: Path, photos: Path, tmp_path: Path, words: list[Any], parts: list[str]
) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    save_file({"0.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "short.safetensors")
    done = bnlab("doctor", *words, "--data", photos, *FAST)
    assert done.status == 2
    for part in parts:
        assert part in done.complaint
    assert not Path("runs").exists()


def test_classes_that_the_classifier_does_not_know_are_named(bnlab: Run, run_copy: Path, photos: Path) -> None:
    (photos / "ring").rename(photos / "hexagon")
    done = bnlab("doctor", run_copy, "--data", photos, *FAST)
    assert done.status == 2
    assert "hexagon" in done.complaint
    assert CARD_KEY not in done.complaint


def test_options_without_effect_on_a_classifier_are_refused(bnlab: Run, run_copy: Path, photos: Path) -> None:
    assert "size has no effect" in bnlab("doctor", run_copy, "--data", photos, "--size", 64).complaint
