"""`bnlab net`: tables, documents and refusals."""

import json
from collections.abc import Callable

import pytest

from bnlab.commands.net import run
from bnlab.config import parse_assignments
from bnlab.nets import NETWORKS
from bnlab.nets.registry import ARCHITECTURE_KEYS
from bnlab.options import NetOptions
from bnlab.progress import NullProgress
from tests.conftest import Outcome

Command = Callable[..., Outcome]
COUNTED = "Multiply-adds of convolutions and linear layers for one image, 3 x {0} x {0};"
NOT_COUNTED = "biases, normalisation, pooling and activations are not counted."


def test_the_table(bnlab: Command) -> None:
    done = bnlab("net", "bn_inception")
    assert done.status == 0
    assert done.err == ""
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert lines[0] == "layer kind output parameters multiply-adds share"
    assert lines[1] == "conv1 7x7 convolution, stride 2 64 x 112 x 112 9,536 118,013,952 5.8%"
    assert "inception3c inception, stride 2 576 x 14 x 14 385,088 143,904,768 7.1%" in lines
    assert lines[-5] == "fc linear 1000 1,025,000 1,024,000 0.1%"
    assert lines[-4:] == ["total 11,285,224 2,032,600,064 100.0%", "", COUNTED.format(224), NOT_COUNTED]
    assert len(lines) == 22
    assert max(map(len, done.out.splitlines()[:-1])) < 100


def test_every_part_by_itself(bnlab: Command) -> None:
    lines = [" ".join(line.split()) for line in bnlab("net", "bn_mlp", "--classes", 10, "--all").out.splitlines()]
    assert lines == [
        "layer kind output parameters multiply-adds",
        "hidden1.linear linear 100 235,200 235,200",
        "hidden1.bn BatchNorm1d 100 200 0",
        "hidden2.linear linear 100 10,000 10,000",
        "hidden2.bn BatchNorm1d 100 200 0",
        "hidden3.linear linear 100 10,000 10,000",
        "hidden3.bn BatchNorm1d 100 200 0",
        "fc linear 10 1,010 1,000",
        "total 256,810 256,200",
        "",
        COUNTED.format(224),
        NOT_COUNTED,
    ]


def test_auxiliary_heads_are_marked_and_counted(bnlab: Command) -> None:
    done = bnlab("net", "bn_googlenet", "--auxiliary", "--set", "variant=torchvision", "--size", 64)
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    names = [line.split()[0] for line in lines if line]
    assert names[names.index("inception4a") + 1] == "aux1"
    assert "aux2 auxiliary head 1000 3,191,016 4,202,496 3.2%" in lines
    assert next(line for line in lines if line.startswith("total")).split()[1] == "13,004,888"
    assert lines[-1] == NOT_COUNTED + " The auxiliary heads are included; they run in training only."


def test_the_list(bnlab: Command) -> None:
    done = bnlab("net")
    assert done.status == 0
    lines = done.out.splitlines()
    assert lines[0].split() == ["network", "description", "variants", "stems"]
    assert tuple(line.split()[0] for line in lines[1:-2]) == tuple(NETWORKS)
    assert "  GoogLeNet with BN  " in lines[1]
    assert "  double, 5x5, torchvision  separable, small" in lines[1]
    assert lines[-1] == "Count one: bnlab net NAME"
    document = json.loads(bnlab("net", "--json").out)
    assert [network["name"] for network in document] == list(NETWORKS)
    assert document[2] == {
        "name": "bn_inception",
        "summary": "BN-Inception, the BN paper's network (Fig. 5)",
        "variants": ["literal", "corrected"],
        "stems": ["separable", "small"],
    }


def test_the_document(bnlab: Command) -> None:
    words = ("--classes", 5, "--size", 32, "--set", "norm=ghost:8", "--set", "in_channels=1", "--set", "width=0.5")
    document = json.loads(bnlab("net", "bn_small_inception", *words, "--json").out)
    assert list(document) == ["network", "arguments", "classes", "size", "parameters", "multiply_adds", "layers"]
    assert (document["network"], document["classes"], document["size"]) == ("bn_small_inception", 5, 32)
    assert set(document["arguments"]) == {*ARCHITECTURE_KEYS, "dropout", "in_channels"}
    assert document["arguments"]["norm"] == "ghost:8"
    assert document["arguments"]["dropout"] == 0.2  # the network's own, and not a recipe's
    assert document["parameters"] == sum(layer["parameters"] for layer in document["layers"])
    assert document["multiply_adds"] == sum(layer["multiply_adds"] for layer in document["layers"])
    conv1 = document["layers"][0]
    assert conv1 == {
        "name": "conv1", "kind": "3x3 convolution", "output": [16, 32, 32], "parameters": 176, "multiply_adds": 147456,
        "parts": [
            {"name": "conv1.conv", "kind": "3x3 convolution", "output": [16, 32, 32], "parameters": 144,
             "multiply_adds": 147456},
            {"name": "conv1.bn", "kind": "GhostBatchNorm2d", "output": [16, 32, 32], "parameters": 32,
             "multiply_adds": 0},
        ],
    }  # fmt: skip


ASSIGNMENTS = {
    "variant": "corrected",
    "norm": "whitening:8",
    "norm_eps": "0.001",
    "norm_momentum": "null",
    "activation": "elu",
    "placement": "after",
    "conv_bias": "true",
    "width": "0.5",
    "stem": "small",
    "local_response": "true",
    "dropout": "0.5",
    "in_channels": "4",
}


def test_every_key_that_shapes_a_network_can_be_set() -> None:
    assert list(ASSIGNMENTS) == [*ARCHITECTURE_KEYS, "dropout", "in_channels"]
    before = run(NetOptions(name="bn_inception", size=32), NullProgress()).arguments
    for key, value in ASSIGNMENTS.items():
        options = parse_assignments([f"{key}={value}"])
        after = run(NetOptions(name="bn_inception", size=32, recipe_keys=options), NullProgress()).arguments
        assert {name for name in before if before[name] != after[name]} == {key}


def test_a_key_without_effect_is_named(bnlab: Command) -> None:
    done = bnlab("net", "mlp", "--set", "norm_eps=0.1", "--json")
    assert (done.status, done.err.strip()) == (0, "warning: norm_eps has no effect: the network is not normalised")


def test_from_python() -> None:
    progress = NullProgress()
    result = run(NetOptions(name="googlenet", recipe_keys={"stem": "separable"}), progress)
    assert result.parameters == sum(layer.parameters for layer in result.layers)
    assert (result.size, result.classes) == (224, 1000)
    assert progress.warnings == []


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("bn_gogglenet",), ("'bn_gogglenet'", "did you mean 'bn_googlenet'?")),
        (("bn_googlenet", "--size", 4), ("bn_googlenet", "4 x 4", "31 x 31")),
        (("bn_inception", "--size", 0), ("size", "0", "1 to 65536")),
        (("bn_inception", "--classes", 0), ("classes", "0", "at least 1")),
        (("bn_inception", "--classes", 10**20), (f"classes is {10**20}", "at most 1000000")),
        (("bn_mlp", "--auxiliary"), ("bn_mlp has no auxiliary classifiers", "leave")),
        (("bn_inception", "--set", "variant=literl"), ("'literl'", "did you mean 'literal'?")),
        (("bn_inception", "--set", "stem=big"), ("'big'", "separable, small")),
        (("bn_inception", "--set", "norm=gost:8"), ("'gost:8'", "did you mean 'ghost'?")),
        (("bn_inception", "--set", "width=99"), ("width 99.0", "16")),
        (("bn_inception", "--set", "in_channels=x"), ("in_channels", "'x'", "at least 1")),
        (("bn_inception", "--set", f"in_channels={10**20}"), (f"in_channels is {10**20}", "at most 1000000")),
        (("bn_inception", "--set", "nrm=none"), ("nrm does not shape a network", "did you mean 'norm'?")),
        (("bn_inception", "--set", "epochs=3"), ("epochs does not shape a network", "there are variant, norm, ")),
        (("bn_inception", "--set", "width"), ("--set width is not KEY=VALUE",)),
    ],
    ids=str,
)
def test_refusals(bnlab: Command, arguments: tuple[object, ...], fragments: tuple[str, ...]) -> None:
    done = bnlab("net", *arguments)
    for fragment in fragments:
        assert fragment in done.complaint
    assert done.status == 2
    assert done.out == ""
