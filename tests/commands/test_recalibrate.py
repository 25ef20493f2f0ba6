"""`bnlab recalibrate`: new files with new statistics, accuracy before and after, and bad input."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bnlab import norm
from bnlab.classifier.file import load_network, read_classifier, save_classifier
from bnlab.classifier.seen import SeenPhotos
from bnlab.files import file_sha256
from tests.commands.test_doctor import CODE, FAST, spoil
from tests.conftest import Outcome

Run = Callable[..., Outcome]


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "own_net.py").write_text(
        CODE + "\ndef plain():\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))\n"
    )
    return tmp_path / "own_net.py"


def prefixes(folder: Path) -> set[int]:
    return {int.from_bytes(bytes.fromhex(file_sha256(path)[:16]), "little") for path in folder.rglob("*.png")}


def test_a_spoilt_classifier_gets_its_statistics_back(bnlab: Run, run_copy: Path, data: Path) -> None:
    file = run_copy / "best.safetensors"
    good = load_network(file)[0]
    spoil(file)
    before = file.read_bytes()
    done = bnlab("recalibrate", file, "--data", data, "--output", "new/fixed.safetensors", *FAST, "--json")
    assert done.status == 0, done.err
    document = json.loads(done.out)
    assert document["measured_on"] == {"split": "train", "images": 24}
    assert (document["accuracy"]["split"], document["accuracy"]["n"]) == ("val", 12)
    assert len(document["layers"]) == 43
    assert file.read_bytes() == before
    network, card = load_network(Path("new/fixed.safetensors"))
    assert card.metrics == {"split": "val", "n": 12, "accuracy": document["accuracy"]["after"]}
    own, new = good.state_dict(), network.state_dict()
    assert all(torch.equal(own[name], new[name]) for name, _ in good.named_parameters())
    mean, expected = new["conv1.bn.running_mean"], own["conv1.bn.running_mean"]
    torch.testing.assert_close(mean, expected, rtol=0.2, atol=0.2)  # not 5, as it was spoilt
    text = bnlab("recalibrate", file, "--data", data, "--output", "text.safetensors", *FAST).out
    assert "statistics measured on 24 photos of train" in text
    assert "points, 95% interval" in text
    assert "p = " in text
    assert "text.safetensors: written" in text


def test_photos_that_gave_the_statistics_count_as_seen(bnlab: Run, run_copy: Path, data: Path) -> None:
    file = run_copy / "best.safetensors"
    network, card = load_network(file)
    from dataclasses import replace

    save_classifier(file, network, replace(card, seen=SeenPhotos(complete=True)))
    done = bnlab("recalibrate", run_copy, "--data", data, "--output", "f.safetensors", *FAST)
    assert done.status == 0, done.err
    seen = read_classifier(Path("f.safetensors"))[1].seen
    assert {int(value) for value in seen.prefixes("train")} == prefixes(data / "train")
    assert not len(seen.prefixes("val"))
    assert seen.complete


def test_photos_that_cannot_be_used_are_named_and_do_not_count(bnlab: Run, run_copy: Path, data: Path) -> None:
    for name in ("broken.png", "torn.png"):
        (data / "train" / "ring" / name).write_bytes(b"no picture")
    done = bnlab("recalibrate", run_copy, "--data", data, "--output", "f.safetensors", *FAST, "--json")
    document = json.loads(done.out)
    assert document["measured_on"]["images"] == 24
    assert {Path(one["path"]).name for one in document["refused"]} == {"broken.png", "torn.png"}
    strict = bnlab("recalibrate", run_copy, "--data", data, "--output", "g.safetensors", *FAST, "--strict")
    assert (strict.status, Path("g.safetensors").exists()) == (2, False)


def test_without_splits_the_same_photos_are_scored_and_it_says_so(bnlab: Run, run_copy: Path, photos: Path) -> None:
    done = bnlab("recalibrate", run_copy, "--data", photos, "--output", "f.safetensors", *FAST, "--layer-by-layer")
    assert done.status == 0, done.err
    assert "measured on the photos that gave the statistics" in done.err
    assert read_classifier(Path("f.safetensors"))[1].metrics == {}


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
def test_a_state_dict_of_a_network_of_the_callers_own(
    bnlab: Run, code: Path, photos: Path, tmp_path: Path, name: str
) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    weights = {("5" + key[1:] if key[0] == "4" else key): value for key, value in network.state_dict().items()}
    torch.save(weights, tmp_path / "own.pt")
    words = ("own_net.py:make", "--weights", "own.pt", "--data", photos, "--size", 24, "--output", name)
    done = bnlab("recalibrate", *words, *FAST, "--json")
    assert done.status == 0, done.err
    found = load_file(name) if name.endswith("safetensors") else torch.load(name, weights_only=True)
    assert found.keys() == weights.keys()
    assert torch.equal(found["0.weight"], weights["0.weight"])
    assert not torch.equal(found["1.running_mean"], weights["1.running_mean"])
    refused = bnlab("recalibrate", *words, *FAST)
    assert (refused.status, f"{name} exists already" in refused.complaint) == (2, True)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["RUN", "--output", "own_net.py"], ["own_net.py does not end in .safetensors"]),
        (["RUN", "--output", "there.safetensors"], ["there.safetensors exists already", "to output"]),
        (["own_net.py:make", "--output", "w.bin"], ["w.bin ends in none of .safetensors, .pt, .pth"]),
        (["own_net.py:plain", "--output", "w.pt"], ["own_net.py:plain has no normalisation layer"]),
        (["own_net.py:broken", "--output", "w.pt"], ["no such luck"]),
        (["missing.safetensors", "--output", "f.safetensors"], ["missing.safetensors"]),
        (["RUN", "--size", "5", "--output", "f.safetensors"], ["size has no effect"]),
    ],
    ids=lambda value: " ".join(value[:1] + value[2:]) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    bnlab: Run, code: Path, run_copy: Path, photos: Path, words: list[Any], parts: list[str]
) -> None:
    save_file({"x": torch.zeros(1)}, "there.safetensors")
    given = [str(run_copy) if word == "RUN" else word for word in words]
    done = bnlab("recalibrate", *given, "--data", photos, *FAST)
    assert done.status == 2
    for part in parts:
        assert part in done.complaint
    assert not Path("f.safetensors").exists()


def test_wrong_classes_and_too_few_photos(bnlab: Run, run_copy: Path, photos: Path) -> None:
    words = ("recalibrate", run_copy, "--data", photos, "--output", "f.safetensors", *FAST)
    for label in ("disc", "stripes"):
        for path in (photos / label).iterdir():
            path.unlink()
        (photos / label).rmdir()
    for path in sorted((photos / "ring").iterdir())[1:]:
        path.unlink()
    done = bnlab(*words)
    assert done.status == 2
    (photos / "ring").rename(photos / "hexagon")
    assert "hexagon" in bnlab(*words).complaint
    assert not Path("f.safetensors").exists()


def test_frozen_layers_are_named(bnlab: Run, run_copy: Path, photos: Path) -> None:
    assert bnlab("freeze", run_copy, "--output", "frozen.safetensors").status == 0
    done = bnlab("recalibrate", "frozen.safetensors", "--data", photos, "--output", "f.safetensors", *FAST)
    assert "no layer of frozen.safetensors can be recalibrated (it is frozen)" in done.complaint
    assert isinstance(load_network(Path("frozen.safetensors"))[0].get_submodule("conv1.bn"), norm.BatchNorm2d)


def test_without_train_val_is_measured_on_and_test_is_scored(bnlab: Run, run_copy: Path, data: Path) -> None:
    files = [(path, "val" if path.is_relative_to(data / "val") else "test") for path in sorted(data.rglob("*.png"))]
    rows = [f"{path},{path.parent.name},{split}" for path, split in files]
    (data / "list.csv").write_text("\n".join(["path,class,split", *rows]) + "\n")
    done = bnlab("recalibrate", run_copy, "--data", data / "list.csv", "--output", "f.safetensors", *FAST, "--json")
    document = json.loads(done.out)
    assert document["measured_on"] == {"split": "val", "images": 12}
    assert document["accuracy"]["split"] == "test"
