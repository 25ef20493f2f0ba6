"""`bnlab import`: from files of weights to classifier files; warnings and refusals."""

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

import bnlab as package
from bnlab.classifier.file import load_network, read_classifier
from bnlab.data.preprocess import normalise, preprocess
from bnlab.machine import versions
from bnlab.nets import build
from bnlab.nets.network import TableNetwork
from bnlab.progress import NullProgress
from tests.conftest import Outcome, picture
from tests.nets.elsewhere import BNInception, GoogLeNet, shaken

Command = Callable[..., Outcome]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small(**options: Any) -> TableNetwork:
    network = shaken(build("bn_small_inception", classes=3, **options))
    assert isinstance(network, TableNetwork)
    return network


def names(count: int) -> str:
    return json.dumps({str(i): f"class {i}" for i in reversed(range(count))})


def save(network: nn.Module, file: str, wrapped: str = "") -> None:
    state = network.state_dict()
    torch.save({wrapped: state, "epoch": 3} if wrapped else state, file)


def test_the_tutorials_file_and_names(bnlab: Command) -> None:
    theirs = shaken(GoogLeNet(5, kernels=(3, 3), bias=True, eps=1e-5, last_pool=3, aux=True))
    save(theirs, "googleNet.pth")
    Path("class_indices.json").write_text(names(5))
    done = bnlab("import", "googleNet.pth", "--output", "new/f.safetensors", "--classes", "class_indices.json")
    assert (done.status, done.err) == (0, "")
    assert done.out == (
        "googleNet.pth: a file of the GoogLeNet tutorial, as bn_googlenet (variant double), "
        "classes: 5, 224 px, squash\n"
        "if these are weights of a bnlab network, pass --format bnlab\n"
        "biases merged into the batch normalisation that follows them: 66\n"
        "left out: 22 tensors of auxiliary heads\n"
        "\n"
        "new/f.safetensors: written. Next: bnlab evaluate new/f.safetensors DATA\n"
    )
    network, card = load_network(Path("new/f.safetensors"))
    assert card.classes == tuple(f"class {i}" for i in range(5))
    assert (card.recipe, card.metrics) == ({"imported_from": "googleNet.pth", "format": "tutorial"}, {})
    assert (dict(card.versions), card.network) == (versions(), "bn_googlenet")
    assert (card.preprocessing.size, card.preprocessing.resize, card.preprocessing.crop_fraction) == (
        224,
        "squash",
        1.0,
    )
    assert card.preprocessing.mean == card.preprocessing.std == (0.5, 0.5, 0.5)

    photo = picture("ring", 0, 300).crop((0, 0, 300, 200))
    pixels = torch.tensor(preprocess(photo, card.preprocessing))[None]
    theirs_sees = np.asarray(photo.resize((224, 224), Image.Resampling.BILINEAR)).copy()
    x = (torch.from_numpy(theirs_sees).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
    with torch.no_grad():
        expected, actual = theirs(x), network(normalise(pixels, card.preprocessing))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_document(bnlab: Command) -> None:
    save(small(conv_bias=True), "w.pt")
    done = bnlab("import", "w.pt", "--output", "c.safetensors", "--json")
    assert json.loads(done.out) == {
        "classifier": "c.safetensors",
        "format": "bnlab",
        "network": "bn_small_inception",
        "variant": "table",
        "classes": 3,
        "tensors": 43 * 7 + 2,
        "prefix": "",
        "dropped": [],
        "other_tensors": [],
        "merged_biases": 43,
    }
    about_names, about_keys = done.err.splitlines()
    assert "0 to 2" in about_names
    assert "pass a file of their names as classes" in about_names
    assert "w.pt does not contain size, resize, crop_fraction, mean, std, activation, placement, norm_eps" in about_keys
    assert about_keys.endswith("if it was trained with others, pass them")
    card = read_classifier(Path("c.safetensors"))[1]
    assert card.classes == ("0", "1", "2")
    assert (card.preprocessing.size, card.preprocessing.resize, card.preprocessing.crop_fraction) == (128, "crop", 0.9)


def test_preprocessing_of_the_formats(home: Path) -> None:
    """An option has precedence."""
    save(shaken(GoogLeNet(3, kernels=(3,), bias=False, eps=0.001, last_pool=2, aux=True)), "tv.pth")
    result = package.import_weights("tv.pth", "tv.safetensors")
    assert repr(result) == f"<ImportResult tv.safetensors, {result.card.network}, 3 classes, 1 warning>"
    card = read_classifier(home / "tv.safetensors")[1]
    assert (card.preprocessing.size, card.preprocessing.resize, card.preprocessing.crop_fraction) == (
        224,
        "crop",
        0.875,
    )
    assert card.preprocessing.mean == card.preprocessing.std == (0.5, 0.5, 0.5)
    assert card.arguments["norm_eps"] == 0.001
    save(shaken(BNInception(3)), "caffe.pth")
    progress = NullProgress()
    package.import_weights("caffe.pth", "caffe.safetensors", size=256, progress=progress)
    card = read_classifier(home / "caffe.safetensors")[1]
    assert (card.preprocessing.size, card.preprocessing.resize, card.preprocessing.crop_fraction) == (
        256,
        "crop",
        0.875,
    )
    assert card.preprocessing.mean == (128 / 255, 117 / 255, 104 / 255)
    assert card.preprocessing.std == (1 / 255,) * 3
    assert len(progress.warnings) == 1  # about the names; the preprocessing is known


def test_an_imported_classifier_answers(bnlab: Command) -> None:
    save(small(width=0.5), "w.pt", wrapped="model")
    Path("names.txt").write_text("disc\nring\n\nstripes\n")
    options = ("--classes", "names.txt", "--set", "width=0.5", "--set", "size=40", "--set", "mean=[0.5, 0.5, 0.5]")
    done = bnlab("import", "w.pt", "--output", "c.safetensors", *options)
    assert done.status == 0
    assert "does not contain resize, crop_fraction, std, activation, placement, norm_eps:" in done.err
    picture("ring", 0).save("ring.png")
    answer = json.loads(bnlab("predict", "c.safetensors", "ring.png", "--json").out)
    assert answer[0]["label"] in ("disc", "ring", "stripes")


@pytest.mark.parametrize("wrapped", ["state_dict", "model", "net", "model_state_dict"])
def test_wrapped_weights(home: Path, wrapped: str) -> None:
    torch.save({wrapped: {f"module._orig_mod.{k}": v for k, v in small().state_dict().items()}, "epoch": 3}, "w.pt")
    package.import_weights(home / "w.pt", home / "c.safetensors")
    safetensors.torch.save_file(small().state_dict(), home / "w.safetensors")
    package.import_weights(home / "w.safetensors", home / "d.safetensors")
    one, other = load_network(home / "c.safetensors")[0], load_network(home / "d.safetensors")[0]
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(one(x), other(x))


class Setting:
    """An object of a training framework in a checkpoint."""


def test_a_checkpoint_of_lightning(bnlab: Command, home: Path) -> None:
    """Weights under the attribute of the module, tensors of a loss, and settings that are objects."""
    network = small()
    state = {f"model._orig_mod.{key}": tensor for key, tensor in network.state_dict().items()}
    state["criterion.weight"] = torch.ones(3)
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    settings = {"lr": 0.1, "schedule": Setting(), "trap": Trap()}
    checkpoint = {"epoch": 3, "pytorch-lightning_version": "2.5", "state_dict": state, "optimizer_states": [optimizer]}
    torch.save(checkpoint | {"hyper_parameters": settings, "callbacks": {"early": {"best": torch.ones(1)}}}, "l.ckpt")
    done = bnlab("import", "l.ckpt", "--output", "l.safetensors")
    assert done.status == 0
    assert "read without what the names of its tensors begin with: model._orig_mod.\n" in done.out
    assert "left out: 1 tensor outside of the network, such as criterion.weight\n" in done.out
    assert not Path("sprung").exists()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_network(home / "l.safetensors")[0](x), network.eval()(x))


def test_of_several_networks_one_is_chosen_by_its_prefix(bnlab: Command, home: Path) -> None:
    one, other = small(), small(conv_bias=False)
    nn.init.constant_(other.fc.bias, 2.0)
    both = {f"{prefix}.{key}": tensor for prefix, network in (("student", one), ("teacher", other))
            for key, tensor in network.state_dict().items()}  # fmt: skip
    torch.save(both, "w.pt")
    done = bnlab("import", "w.pt", "--output", "c.safetensors")
    assert done.complaint == (
        "w.pt holds 2 networks, whose names begin with 'student.', 'teacher.': pass one of them as prefix"
    )
    done = bnlab("import", "w.pt", "--output", "c.safetensors", "--prefix", "teacher.", "--json")
    document = json.loads(done.out)
    assert (document["prefix"], len(document["other_tensors"])) == ("teacher.", len(one.state_dict()))
    assert torch.equal(load_network(home / "c.safetensors")[0].fc.bias, other.fc.bias)
    done = bnlab("import", "w.pt", "--output", "d.safetensors", "--prefix", "student.fc.")
    assert done.status == 2
    done = bnlab("import", "w.pt", "--output", "d.safetensors", "--prefix", "model.")
    assert done.complaint.startswith("no name in w.pt begins with 'model.'")
    assert not Path("d.safetensors").exists()


def test_tensors_that_share_memory(home: Path) -> None:
    state = small().state_dict()
    state["inception2a.branch1.bn.weight"] = state["inception2a.branch1.bn.bias"]
    torch.save(state, "w.pt")
    package.import_weights("w.pt", "c.safetensors")
    assert load_network(home / "c.safetensors")


def test_mismatches_are_named_then_summed_up(bnlab: Command) -> None:
    save(small(width=0.5), "w.pt")
    done = bnlab("import", "w.pt", "--output", "c.safetensors")
    lines = done.err.splitlines()
    assert lines[0] == "warning: conv1.conv.weight is 16 x 3 x 3 x 3, not 32 x 3 x 3 x 3"
    assert len(lines) == 22
    assert lines[20] == "warning: and 196 more"
    for fragment in ("w.pt", "bn_small_inception (variant table)", "216 tensors do not match", "network", "width=0.5"):
        assert fragment in done.complaint
    assert not Path("c.safetensors").exists()

    state = small().state_dict()
    del state["fc.bias"]
    torch.save(state, "w.pt")
    done = bnlab("import", "w.pt", "--output", "c.safetensors")
    assert done.err.splitlines()[0] == "warning: fc.bias is missing"
    assert "1 tensor does not match" in done.complaint


class Trap:
    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (Path("sprung"),))


def write_files() -> None:
    """Write one file of each kind that is refused."""
    save(small(), "w.pt")
    content = Path("w.pt").read_bytes()
    torch.save(small(), "whole.pt")
    torch.save(small(), "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"a": Trap()}, "trap.pt")
    torch.save({"a": Trap()}, "oldtrap.pt", _use_new_zipfile_serialization=False)
    Path("cut.pt").write_bytes(content[: len(content) // 2])
    torch.save(small().state_dict(), "oldw.pt", _use_new_zipfile_serialization=False)
    content = Path("oldw.pt").read_bytes()
    Path("oldcut.pt").write_bytes(content[: len(content) // 2])
    Path("oldstub.pt").write_bytes(content[:200])
    Path("empty.pt").touch()
    picture("ring", 0).save("photo.png")
    Path("folder").mkdir()
    os.mkfifo("pipe")
    with zipfile.ZipFile("other.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), "script.pt")  # type: ignore[no-untyped-call]
    torch.save([1, 2], "list.pt")
    torch.save({}, "nothing.pt")
    torch.save({"a": torch.zeros(2), "epoch": 3}, "mixed.pt")
    safetensors.torch.save_file({"a": torch.zeros(2)}, "card.safetensors", {"bnlab": "{}"})
    Path("cut.safetensors").write_bytes(safetensors.torch.save({"a": torch.zeros(99)})[:100])
    looped: dict[str, Any] = {}
    looped["model"] = looped
    torch.save(looped, "looped.pt")
    nan = small()
    nn.init.constant_(nan.fc.bias, float("nan"))
    save(nan, "nan.pt")
    Path("taken.safetensors").write_text("mine")
    Path("two.txt").write_text("a\nb\n")
    Path("twice.json").write_text('["a", "b", "a"]')
    Path("gap.json").write_text('{"0": "a", "1": "b", "3": "c"}')
    Path("backwards.json").write_text('{"a": 0, "b": 1, "c": 2}')
    Path("odd.json").write_text('["a", 2, "c"]')
    Path("half.json").write_text('["a", ')
    Path("surrogate.json").write_text(r'["a", "b", "\ud800"]')
    Path("latin.txt").write_bytes("ä".encode("latin-1"))
    Path("blank.txt").write_text("\n")


# Arguments, and parts of the refusal.
NOT_WEIGHTS = ("torch.save(network.state_dict(), FILE)", "safetensors")
REFUSALS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    *(((file,), ("run code", "state_dict()")) for file in ("whole.pt", "old.pt", "trap.pt", "oldtrap.pt")),
    *(((file,), NOT_WEIGHTS) for file in ("cut.pt", "oldcut.pt", "oldstub.pt", "empty.pt", "photo.png", "other.zip")),
    (("cut.safetensors",), NOT_WEIGHTS),
    (("none.pt",), ("check the path",)),
    (("folder",), ("is a folder",)),
    (("pipe",), ("regular file",)),
    (("script.pt",), ("TorchScript", "state_dict()")),
    (("list.pt",), ("list", "state_dict()")),
    (("nothing.pt",), ("nothing", "state_dict()")),
    (("mixed.pt",), ("'epoch' (int)", "state_dict()")),
    (("looped.pt",), ("'model' (dict)", "state_dict()")),
    (("card.safetensors",), ("already", "bnlab evaluate card.safetensors DATA")),
    (("nan.pt",), ("fc.bias", "NaN")),
    (("w.pt", "--output", "taken.safetensors"), ("taken.safetensors exists already", "pass a new file to output")),
    (("w.pt", "--output", "c.pth"), ("c.pth does not end in .safetensors", "pass such a name to output")),
    (("w.pt", "--set", "sise=96"), ("'sise'", "did you mean 'size'?")),
    (("w.pt", "--set", "epochs=3"), ("'epochs'", "there are network, variant, ", "mean, std")),
    (("w.pt", "--set", "size=15"), ("size is 15", "greater than or equal to 16")),
    (("w.pt", "--network", "bn_gogglenet"), ("'bn_gogglenet'", "did you mean 'bn_googlenet'?")),
    (("w.pt", "--classes", "two.txt"), ("two.txt has 2 names", "fc.weight of w.pt has 3 rows")),
    (("w.pt", "--classes", "twice.json"), ("twice.json", "'a'", "classes 0 and 2")),
    (("w.pt", "--classes", "gap.json"), ("gap.json has no class 2", "0 to 2")),
    (("w.pt", "--classes", "backwards.json"), ("backwards.json has no class 0", "0 to 2")),
    (("w.pt", "--classes", "odd.json"), ("class 1 in odd.json is not text",)),
    (("w.pt", "--classes", "surrogate.json"), ("class 2 in surrogate.json is not text",)),
    (("w.pt", "--classes", "half.json"), ("half.json is not JSON", '["daisy", ...]')),
    (("w.pt", "--classes", "latin.txt"), ("latin.txt cannot be read", "as classes")),
    (("w.pt", "--classes", "none.txt"), ("none.txt cannot be read (No such file", "as classes")),
    (("w.pt", "--classes", "blank.txt"), ("blank.txt names no classes", "as classes")),
]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_refusals(bnlab: Command) -> None:
    """One line on stderr with what, where and the remedy; nothing is written, and no code is run."""
    write_files()
    before = sorted(Path().rglob("*"))
    for arguments, fragments in REFUSALS:
        output = () if "--output" in arguments else ("--output", "c.safetensors")
        done = bnlab("import", *arguments, *output)
        for fragment in (arguments[0] if len(arguments) == 1 else "", *fragments):
            assert fragment in done.complaint
        assert (done.status, done.out) == (2, "")
        assert sorted(Path().rglob("*")) == before
    assert Path("taken.safetensors").read_text() == "mine"


def test_a_preprocessing_key_without_effect_is_reported(bnlab: Command) -> None:
    save(small(), "w.pt")
    done = bnlab("import", "w.pt", "--output", "c.safetensors", "--set", "resize=squash", "--set", "crop_fraction=0.5")
    assert "warning: crop_fraction has no effect: it is for resize crop\n" in done.err


def test_a_key_without_effect_on_the_network_is_reported(bnlab: Command) -> None:
    save(small(), "w.pt")
    for norm, named in (("none", True), ("batch", False)):
        save(small(norm=norm), f"{norm}.pt")
        keys = ("--set", f"norm={norm}", "--set", "norm_eps=0.1")
        done = bnlab("import", f"{norm}.pt", "--output", f"{norm}.safetensors", "--format", "bnlab", *keys)
        assert done.status == 0, done.err
        assert ("norm_eps has no effect: the network is not normalised" in done.err) == named


def test_names_in_both_forms_of_unicode_are_the_same(bnlab: Command) -> None:
    save(small(), "w.pt")
    Path("n.json").write_text(json.dumps(["é", "e\u0301", "c"]))
    assert bnlab("import", "w.pt", "--output", "c.safetensors", "--classes", "n.json").complaint.startswith(
        "n.json has the name 'e\u0301' for classes 0 and 1: "
    )


def test_a_place_that_cannot_be_written_to(bnlab: Command) -> None:
    save(small(), "w.pt")
    Path("file").touch()
    assert bnlab("import", "w.pt", "--output", "file/c.safetensors").complaint.startswith(
        "file/c.safetensors cannot be written (File exists): "
    )


def test_the_same_weights_give_the_same_bytes(home: Path) -> None:
    content = io.BytesIO()
    torch.save(small().state_dict(), content)
    for name in ("a", "b"):
        (home / "w.pt").write_bytes(content.getvalue())
        package.import_weights(home / "w.pt", home / f"{name}.safetensors", norm="ghost:8")
    assert (home / "a.safetensors").read_bytes() == (home / "b.safetensors").read_bytes()
    assert load_network(home / "a.safetensors")[0].arguments["norm"] == "ghost:8"


def test_a_bnlab_network_that_looks_like_a_published_one(bnlab: Command, home: Path) -> None:
    """Nothing in the file distinguishes them, so the guess is printed and can be corrected."""
    network = shaken(build("bn_googlenet", classes=3, variant="torchvision", width=1.0))
    save(network, "w.pt")
    done = bnlab("import", "w.pt", "--output", "guessed.safetensors")
    assert "pass --format bnlab" in done.out
    assert read_classifier(home / "guessed.safetensors")[1].arguments["norm_eps"] == 0.001
    done = bnlab("import", "w.pt", "--output", "given.safetensors", "--format", "bnlab")
    assert "--format" not in done.out
    assert "w.pt does not contain size, " in done.err
    x = torch.randn(2, 3, 64, 64)
    ours, _ = load_network(home / "given.safetensors")
    torch.testing.assert_close(ours(x), network.eval()(x), rtol=0, atol=0)
    done = bnlab("import", "w.pt", "--output", "x.safetensors", "--format", "torchvison")
    assert done.complaint.startswith("no format is called 'torchvison': did you mean 'torchvision'?")


def test_files_that_claim_more_than_they_hold(bnlab: Command, home: Path) -> None:
    state = build("mlp", classes=3).state_dict()
    for name, tensor, message in (
        ("fc.weight", torch.zeros(1).expand(2**40, 100), "w.pt has fc.weight without the numbers of its shape"),
        ("fc.weight", torch.zeros(1).expand(2**55, 100), "w.pt has fc.weight without the numbers of its shape"),
        ("fc.bias", torch.zeros(0), "w.pt has fc.bias without the numbers of its shape"),
    ):
        torch.save({**state, name: tensor}, "w.pt")
        assert bnlab("import", "w.pt", "--output", "o.safetensors").complaint.startswith(message)
    torch.save(torch.zeros(3), "bare.pt")
    done = bnlab("import", "bare.pt", "--output", "o.safetensors")
    assert done.complaint.startswith("bare.pt holds a Tensor")
    assert not (home / "o.safetensors").exists()


def test_damaged_headers_of_safetensors(bnlab: Command, home: Path) -> None:
    header = json.dumps({"__metadata__": None}).encode()
    (home / "null.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    done = bnlab("import", "null.safetensors", "--output", "o.safetensors")
    assert done.status == 2
    assert done.complaint


def test_invalid_counters_become_1(home: Path) -> None:
    state = build("bn_mlp", classes=3).state_dict()
    key = "hidden1.bn.num_batches_tracked"
    for counter, kept in (
        (torch.tensor(torch.nan), 1), (torch.tensor(torch.inf), 1), (torch.tensor(-5), 1), (torch.tensor(7), 7),
        (torch.tensor(1 + 2j), 1), (torch.tensor([1, 2]), 1),
    ):  # fmt: skip
        torch.save({**state, key: counter}, "w.pt")
        (home / "o.safetensors").unlink(missing_ok=True)
        package.import_weights("w.pt", "o.safetensors", network="bn_mlp")
        assert int(read_classifier(home / "o.safetensors")[0][key]) == kept
