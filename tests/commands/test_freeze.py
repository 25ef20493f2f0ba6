"""`bnlab freeze`: the file, what loading and training make of it, and bad input."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from bnlab import Classifier
from bnlab.classifier.file import load_network, read_classifier, save_classifier
from bnlab.nets import build
from bnlab.norm.freeze import Freezable
from tests.commands.test_doctor import FAST
from tests.conftest import QUICK, Outcome

Run = Callable[..., Outcome]


def norms(network: nn.Module) -> list[Freezable]:
    return [module for module in network.modules() if isinstance(module, Freezable)]


def test_the_file_loads_frozen_and_predicts_the_same(bnlab: Run, run_copy: Path, data: Path) -> None:
    done = bnlab("freeze", run_copy, "--output", "f.safetensors", "--data", data, *FAST, "--json")
    assert done.status == 0, done.err
    document = json.loads(done.out)
    assert (len(document["layers"]), document["kept"]) == (43, {})
    accuracy = document["accuracy"]
    assert (accuracy["split"], accuracy["n"], accuracy["before"], accuracy["p"]) == ("val", 12, accuracy["after"], 1.0)
    tensors, card = read_classifier(Path("f.safetensors"))
    old, before = read_classifier(run_copy / "best.safetensors")
    assert (card.frozen_norms, before.frozen_norms) == (True, False)
    assert all(torch.equal(tensors[name], old[name]) for name in old)
    network = Classifier.load("f.safetensors", "cpu").network.train()
    assert all(layer.frozen and not layer.training for layer in norms(network))
    assert not any(layer.frozen for layer in norms(Classifier.load(run_copy, "cpu").network))
    text = bnlab("freeze", "f.safetensors", "--output", "again.safetensors")
    assert "are frozen already" in text.err
    assert "43 layers frozen" in text.out
    Classifier.load("again.safetensors").save("saved.safetensors")
    assert read_classifier(Path("saved.safetensors"))[1].frozen_norms


def test_training_from_it_keeps_the_layers_frozen(bnlab: Run, run_copy: Path, data: Path) -> None:
    assert bnlab("freeze", run_copy, "--output", "f.safetensors").status == 0
    quick = [*QUICK, "--epochs", 1, "--init", "f.safetensors"]
    quick = [*quick[2:]]  # the network is that of the file
    done = bnlab("train", data, *quick, "--name", "tuned")
    assert done.status == 0, done.err
    assert "the normalisation layers of f.safetensors are frozen, and stay so" in done.err
    own, tuned = (read_classifier(Path(name))[0] for name in ("f.safetensors", "runs/tuned/best.safetensors"))
    statistics = [name for name in own if "running" in name or name.endswith("bn.weight")]
    assert len(statistics) > 100
    assert all(torch.equal(own[name], tuned[name]) for name in statistics)
    assert not torch.equal(own["fc.weight"], tuned["fc.weight"])
    done = bnlab("train", data, *quick, "--name", "free", "--set", "freeze_bn=false")
    assert "frozen" not in done.err
    free = read_classifier(Path("runs/free/best.safetensors"))[0]
    assert not all(torch.equal(own[name], free[name]) for name in statistics)


def test_bad_input_is_one_line(bnlab: Run, run_copy: Path, photos: Path) -> None:
    Path("there.safetensors").write_bytes(b"mine")
    done = bnlab("freeze", run_copy, "--output", "there.safetensors")
    assert (done.status, "there.safetensors exists already" in done.complaint) == (2, True)
    assert Path("there.safetensors").read_bytes() == b"mine"
    assert "does not end in .safetensors" in bnlab("freeze", run_copy, "--output", "f.pt").complaint
    assert "net.py:make" in bnlab("freeze", "net.py:make", "--output", "f.safetensors").complaint
    (photos / "ring").rename(photos / "hexagon")
    done = bnlab("freeze", run_copy, "--output", "f.safetensors", "--data", photos)
    assert "hexagon" in done.complaint
    assert not Path("f.safetensors").exists()


@pytest.mark.parametrize("norm", ["none"])
def test_a_network_without_batch_normalisation_is_refused(bnlab: Run, run_copy: Path, norm: str) -> None:
    from dataclasses import replace

    _, card = load_network(run_copy / "best.safetensors")
    network = build("bn_small_inception", classes=3, norm=norm)
    card = replace(card, arguments=network.arguments)
    save_classifier(Path("plain.safetensors"), network, card)
    done = bnlab("freeze", "plain.safetensors", "--output", "f.safetensors")
    assert "plain.safetensors has no normalisation layer to freeze (it has none)" in done.complaint
