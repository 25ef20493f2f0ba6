"""`bnlab doctor` on classifiers and on networks of the caller's own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bnlab import norm
from bnlab.classifier.file import CARD_KEY, load_network, save_classifier
from bnlab.classifier.opened import open_classifier, photo_batches
from bnlab.data.dataset import open_evaluation_data
from bnlab.nets.network import TableNetwork
from bnlab.options import DoctorOptions
from tests.conftest import Outcome

Run = Callable[..., Outcome]
FAST = ("--workers", 0, "--batch-size", 18)
GAP = ("--select", "BN101", "--select", "BN102")
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


def test_photos_that_it_was_trained_on_are_counted(bnlab: Run, run_copy: Path, data: Path) -> None:
    done = bnlab("doctor", run_copy, "--data", data, "--split", "train", *FAST, "--select", "gamma-near-zero")
    assert "photos are among those it was trained on: its accuracy on others is what counts" in done.err
    other = bnlab("doctor", run_copy, "--data", data, "--split", "test", *FAST, "--select", "gamma-near-zero")
    assert "trained on" not in other.err


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
    done = bnlab("doctor", run_copy, "--data", photos, *FAST, *GAP)
    assert done.status == 1
    assert "BN101 train-eval-gap" in done.out
    command = f"bnlab recalibrate {run_copy} --data {photos} --output recalibrated.safetensors"
    assert command in done.out
    Path("recalibrated.safetensors").write_text("mine")
    assert not [line for line in done.out.splitlines() if line.endswith(" ")]
    again = bnlab("doctor", run_copy, "--data", photos, *FAST, *GAP, "--baseline", "runs/doctor/diagnosis.json")
    assert again.status == 0
    assert "of the baseline not shown" in again.out
    assert "no new findings" in again.out
    other = bnlab("doctor", run_copy, "--data", photos, *FAST, *GAP, "--select", "BN005", "--select", "BN103")
    assert f"{command[:-12]}2.safetensors" in other.out
    assert "BN005 was not made: it needs " in other.out
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


def test_of_several_sets_of_weights_one_is_chosen(bnlab: Run, code: Path, photos: Path, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    weights = {("5" + name[1:] if name[0] == "4" else name): value for name, value in network.state_dict().items()}
    gamma = torch.tensor([1e-9, 1, 1, 1, 1, 1, 1, 1])
    torch.save({"model": weights | {"1.weight": gamma}, "model_ema": weights}, tmp_path / "w.pt")
    words = ["doctor", "own_net.py:make", "--weights", "w.pt", "--data", photos, "--size", 24, *FAST]
    refused = bnlab(*words)
    assert refused.status == 2
    assert "2 sets of weights" in refused.err
    assert "model_ema." in refused.err
    for prefix, found in (("model", 1), ("model_ema.", 0)):
        done = bnlab(*words, "--prefix", prefix, "--json", "--select", "gamma-near-zero", "--fail-on", "error")
        assert done.status == 0, done.err
        assert len(json.loads(done.out)["findings"]) == found


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
        (["own_net.py:make", "--prefix", "model"], ["prefix has no effect without weights"]),
        (["own_net.py:make", "--mean", "a,b,c"], ["mean 'a,b,c'"]),
        (["own_net.py:make", "--std", "0,1,1"], ["std '0,1,1'"]),
        (["own_net.py:make", "--std", "nan"], ["std 'nan'"]),
        (["own_net.py:make", "--mean", "123.7,116.3,103.5"], ["mean '123.7,116.3,103.5'", "divided by 255"]),
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


def teach(file: Path, photos: Path) -> None:
    """Give a classifier file the last layer that separates the classes of these photos, and their statistics."""
    model = open_classifier(file)
    some = open_evaluation_data(photos, None)[1]
    assert model.classes is not None
    options = DoctorOptions(model=str(file), data=photos, batch_size=36, images=100, workers=0)
    batches = photo_batches(model, some, model.classes, options)
    norm.recalibrate(model.network, batches)
    features: list[torch.Tensor] = []
    head = model.network.get_submodule("fc")
    assert isinstance(head, nn.Linear)
    handle = head.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    with torch.no_grad():
        ((images, labels),) = batches
        model.network(images)
        handle.remove()
        x = torch.cat([features[0], torch.ones(len(labels), 1)], 1)  # N x features + 1
        solution = torch.linalg.lstsq(x, nn.functional.one_hot(labels, 3).float()).solution.T
        head.weight.copy_(20 * solution[:, :-1])
        head.bias.copy_(20 * solution[:, -1])
    network, card = model.network, model.card
    assert isinstance(network, TableNetwork)
    assert card is not None
    save_classifier(file, network, card)


def test_fix_writes_a_repaired_classifier(bnlab: Run, run_copy: Path, photos: Path) -> None:
    file = run_copy / "best.safetensors"
    teach(file, photos)
    spoil(file)
    before = file.read_bytes()
    done = bnlab("doctor", run_copy, "--data", photos, *FAST, *GAP, "--fix", "new/f.safetensors", "--json")
    assert done.status == 1, done.err
    fix = json.loads(done.out)["fix"]
    assert fix["output"] == "new/f.safetensors"
    assert [(one["repair"], one["kept"]) for one in fix["repairs"]] == [("recalibrate", True)]
    assert fix["comparison"]["after"] > fix["comparison"]["before"]
    assert fix["comparison"]["p"] < 0.01
    assert file.read_bytes() == before
    assert "Recalibrate (safe) changed 43 layers" in Path("runs/doctor/report.html").read_text()
    again = bnlab("doctor", "new/f.safetensors", "--data", photos, *FAST, *GAP, "--fix", "g.safetensors", "--json")
    assert json.loads(again.out)["accuracy"]["running"] == fix["comparison"]["after"]
    assert json.loads(again.out)["fix"]["output"] is None
    assert "g.safetensors was not written, since no safe repair is shown to help" in again.err
    assert not Path("g.safetensors").exists()
    shown = bnlab("doctor", run_copy, "--data", photos, *FAST, *GAP, "--fix", "h.safetensors").out
    assert "Recalibrate (safe) changed 43 layers" in shown
    assert "h.safetensors: the repaired weights." in shown


def test_fix_refuses_an_existing_file_before_anything_is_computed(bnlab: Run, run_copy: Path, photos: Path) -> None:
    Path("there.safetensors").write_bytes(b"mine")
    done = bnlab("doctor", run_copy, "--data", photos, *FAST, "--fix", "there.safetensors")
    assert (done.status, "there.safetensors exists already" in done.complaint) == (2, True)
    assert not Path("runs/doctor").exists()


def test_fix_writes_a_state_dict_of_a_network_of_code(bnlab: Run, code: Path, photos: Path) -> None:
    torch.manual_seed(0)
    done = bnlab("doctor", "own_net.py:make", "--data", photos, "--size", 24, *FAST, "--fix", "w.pt", "--json")
    fix = json.loads(done.out)["fix"]
    assert ("drop_bias", True) in [(one["repair"], one["kept"]) for one in fix["repairs"]]
    assert not torch.load("w.pt", weights_only=True)["0.bias"].any()


def test_a_class_that_is_in_train_alone_counts(bnlab: Run, code: Path, data: Path) -> None:
    shutil.rmtree(data / "val" / "ring")
    done = bnlab("doctor", "own_net.py:make", "--data", data, "--size", 24, *FAST, *GAP, "--json")
    assert done.status in (0, 1), done.err
