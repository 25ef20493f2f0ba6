"""Converted weights give the outputs of the network that they are from; mismatches have the names of the file."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnlab.data.preprocess import Preprocessing, normalise
from bnlab.errors import ClassifierError, UsageError
from bnlab.nets import build
from bnlab.nets.convert import Conversion, convert
from tests.nets.elsewhere import BNInception, GoogLeNet, shaken

SIDE = 40


def tutorial(*, kernels: tuple[int, ...] = (3, 3), eps: float | None = 1e-5, aux: bool = True) -> nn.Module:
    return shaken(GoogLeNet(5, kernels=kernels, bias=True, eps=eps, last_pool=3, aux=aux))


def torchvision(*, aux: bool = True) -> nn.Module:
    return shaken(GoogLeNet(7, kernels=(3,), bias=False, eps=0.001, last_pool=2, aux=aux))


def converted(theirs: nn.Module, **more: Any) -> Conversion:
    return convert(theirs.state_dict(), file="x.pth", **more)


def photos(side: int = SIDE) -> Tensor:
    """uint8, N x H x W x 3, RGB."""
    torch.manual_seed(1)
    return torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8)


def preprocessed(images: Tensor, conversion: Conversion) -> Tensor:
    return normalise(images, Preprocessing(**conversion.format.preprocessing))


def assert_same(ours: nn.Module, theirs: nn.Module, x: Tensor, x_theirs: Tensor | None = None) -> float:
    """Compare to 1e-5 of the largest logit, which float32 keeps over some sixty layers; return the deviation."""
    with torch.no_grad():
        expected, actual = theirs(x if x_theirs is None else x_theirs), ours(x)
    scale = float(expected.abs().max())
    assert scale > 0.01
    assert float((expected[0] - expected[1]).abs().max()) > 1e-3 * scale  # the logits depend on the photo
    deviation = float((actual - expected).abs().max()) / scale
    assert deviation < 1e-5
    return deviation


@pytest.mark.parametrize(("aux", "side"), [(True, 40), (False, 64)])
def test_the_tutorials_network_with_bn(aux: bool, side: int) -> None:
    theirs = tutorial(aux=aux)
    done = converted(theirs)
    assert (done.format.name, done.network.name, done.network.arguments["variant"]) == (
        "tutorial", "bn_googlenet", "double",
    )  # fmt: skip
    assert (done.merged, done.tensors) == (66, 66 * 7 + 2)
    assert done.dropped == tuple(name for name in theirs.state_dict() if name.startswith("aux"))
    assert len(done.dropped) == 22 * aux
    assert not done.network.training
    assert all(layer.bias is None for layer in done.network.modules() if isinstance(layer, nn.Conv2d))
    assert_same(
        done.network, theirs, preprocessed(photos(side), done), (photos(side).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    )


@pytest.mark.parametrize(("kernels", "variant"), [((5,), "5x5"), ((3, 3), "double")])
def test_the_tutorials_network_without_bn(kernels: tuple[int, ...], variant: str) -> None:
    theirs = tutorial(kernels=kernels, eps=None)
    done = converted(theirs)
    assert (done.format.name, done.network.name, done.merged) == ("tutorial", "googlenet", 0)
    assert done.network.arguments["variant"] == variant
    assert_same(done.network, theirs, preprocessed(photos(), done))


def test_merged_biases_matter() -> None:
    """Without the biases the outputs differ, so parity is not an accident."""
    theirs = tutorial(aux=False)
    done = converted(theirs)
    for layer in theirs.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.bias)
    with pytest.raises(AssertionError):
        assert_same(done.network, theirs, preprocessed(photos(), done))


@pytest.mark.parametrize(("aux", "side"), [(True, 40), (False, 64)])
def test_torchvisions_googlenet(aux: bool, side: int) -> None:
    theirs = torchvision(aux=aux)
    done = converted(theirs)
    assert (done.format.name, done.network.name, done.merged) == ("torchvision", "bn_googlenet", 0)
    assert (done.network.arguments["variant"], done.network.arguments["norm_eps"]) == ("torchvision", 0.001)
    assert {layer.eps for layer in done.network.modules() if isinstance(layer, nn.BatchNorm2d)} == {0.001}
    images = photos(side)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (images / 255 - mean) / std
    x = x * (std / 0.5) + (mean - 0.5) / 0.5  # its transform_input
    assert_same(done.network, theirs, preprocessed(images, done), x.permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("projection", "variant", "last"), [(128, "literal", "last_linear"), (96, "corrected", "fc_action")]
)
def test_bn_inception_with_caffes_names(projection: int, variant: str, last: str) -> None:
    theirs = shaken(BNInception(6, projection=projection, last=last))
    done = converted(theirs)
    assert (done.format.name, done.network.name, done.merged) == ("caffe", "bn_inception", 69)
    assert done.network.arguments["variant"] == variant
    assert done.last_layer == f"{last}.weight"
    images = photos(64)
    bgr = images.float().flip(3) - torch.tensor([104.0, 117.0, 128.0])
    assert_same(done.network, theirs, preprocessed(images, done), bgr.permute(0, 3, 1, 2))


def test_old_caffe_files() -> None:
    """BN's tensors as 1 x C, no counters, DataParallel's and the video network's prefixes, and half precision."""
    theirs = shaken(BNInception(6, last="new_fc").half().float())
    old = {}
    for name, tensor in theirs.state_dict().items():
        prefix = "module." if name.startswith("new_fc") else "module.base_model."
        if not name.endswith("num_batches_tracked"):
            old[prefix + name] = (tensor[None] if "_bn." in name else tensor).clone()
    done = convert(old, file="x.pth")
    assert done.mismatches == ()
    assert {int(t) for name, t in done.network.state_dict().items() if name.endswith("num_batches_tracked")} == {1}
    new = converted(theirs)
    x = preprocessed(photos(), done)
    with torch.no_grad():
        assert torch.equal(done.network(x), new.network(x))
    half = convert({name: tensor.half() for name, tensor in old.items()}, file="x.pth")
    assert {p.dtype for p in half.network.parameters()} == {torch.float32}


ROUND_TRIPS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("bn_googlenet", {}, {}),
    ("bn_googlenet", {"auxiliary": True}, {}),
    ("bn_googlenet", {"variant": "5x5", "stem": "separable"}, {}),
    ("bn_googlenet", {"variant": "5x5", "stem": "small"}, {}),
    ("googlenet", {"variant": "torchvision"}, {}),
    ("bn_inception", {"variant": "corrected"}, {}),
    ("inception", {}, {}),
    ("bn_small_inception", {}, {}),
    ("small_inception", {}, {}),
    ("mlp", {}, {}),
    ("bn_mlp", {}, {}),
    ("bn_small_inception", {"width": 0.5}, {"options": {"width": 0.5}}),
    ("bn_small_inception", {"norm": "whitening:8"}, {"options": {"norm": "whitening:8"}}),
    ("bn_small_inception", {"placement": "after"}, {"options": {"placement": "after"}}),
    ("bn_small_inception", {"activation": "elu", "norm": "ghost:4"}, {"options": {"activation": "elu"}}),
    ("small_inception", {"norm": "batch"}, {"network": "small_inception", "options": {"norm": "batch"}}),
    ("googlenet", {}, {"options": {"norm": "none"}}),
]


@pytest.mark.parametrize(("name", "made", "given"), ROUND_TRIPS, ids=[f"{n}-{m}-{t}" for n, m, t in ROUND_TRIPS])
def test_round_trips(name: str, made: dict[str, Any], given: dict[str, Any]) -> None:
    theirs = shaken(build(name, classes=4, **made))
    done = converted(theirs, **given)
    assert done.mismatches == ()
    assert done.network.name == name
    norm = theirs.arguments["norm"]
    assert done.network.arguments["norm"] == ("batch" if norm == "ghost:4" else norm)  # the same tensors
    assert done.merged == 0
    if "norm" not in made:
        assert done.network.arguments | {"dropout": 0} == theirs.arguments | {"dropout": 0}
    assert bool(done.dropped) == ("auxiliary" in made)
    x = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        assert torch.equal(done.network(x), theirs(x))


@pytest.mark.parametrize(
    ("name", "made", "given", "merged"),
    [
        ("bn_small_inception", {}, {}, 43),
        ("bn_mlp", {}, {}, 3),
        ("bn_googlenet", {"stem": "separable", "auxiliary": True}, {}, 66),
        ("bn_small_inception", {"norm": "whitening:4"}, {"norm": "whitening:4"}, 43),
        ("bn_small_inception", {}, {"conv_bias": True}, 0),
    ],
)
def test_redundant_biases(name: str, made: dict[str, Any], given: dict[str, Any], merged: int) -> None:
    """Biases of bnlab's own networks are merged unless the options keep them."""
    theirs = shaken(build(name, classes=4, conv_bias=True, **made))
    done = converted(theirs, options=given)
    assert (done.mismatches, done.merged) == ((), merged)
    assert done.network.arguments["conv_bias"] == (merged == 0)
    assert done.network.name == name
    assert_same(done.network, theirs, torch.randn(2, 3, SIDE, SIDE))


def test_options_override_the_format() -> None:
    assert converted(torchvision(), options={"norm_eps": 0.01}).network.arguments["norm_eps"] == 0.01
    assert converted(tutorial(), network="bn_googlenet", options={"norm": "sync"}).network.arguments["norm"] == "sync"


def test_mismatches_have_the_names_of_the_file() -> None:
    tensors = dict(shaken(BNInception(6)).state_dict())
    del tensors["inception_3a_1x1.weight"]
    del tensors["last_linear.bias"]
    tensors["inception_4e_3x3_bn.running_var"] = torch.ones(3)
    tensors["bias"] = torch.tensor(0.0)
    done = convert({f"module.{name}": tensor for name, tensor in tensors.items()}, file="x.pth")
    assert (done.network.name, done.network.arguments["variant"]) == ("bn_inception", "literal")
    assert sorted(done.mismatches) == [
        "module.bias is unknown",
        "module.inception_3a_1x1.weight is missing",
        "module.inception_4e_3x3_bn.running_var is 3, not 192",
        "module.last_linear.bias is missing",
    ]

    plain = dict(torchvision(aux=False).state_dict())
    plain["conv1.conv.weight"] = torch.zeros(64, 3, 5, 5)
    plain["conv1.bn.bias"] = torch.tensor(1.0)
    assert convert(plain, file="x.pth").mismatches == (
        "conv1.conv.weight is 64 x 3 x 5 x 5, not 64 x 3 x 7 x 7", "conv1.bn.bias is one number, not 64",
    )  # fmt: skip


def test_the_second_of_two_equal_names_is_unknown() -> None:
    tensors = dict(shaken(build("mlp", classes=2)).state_dict())
    assert convert(tensors | {"module.fc.bias": torch.zeros(2)}, file="x.pth").mismatches == (
        "module.fc.bias is unknown",
    )


def test_a_file_with_nothing_in_common() -> None:
    done = convert({"layer4.0.conv1.weight": torch.zeros(3)}, file="x.pth")
    assert "layer4.0.conv1.weight is unknown" in done.mismatches


PACKED = "before they are quantised or packed"
REFUSALS: list[tuple[str, Callable[[Tensor], Tensor], str, str]] = [
    ("fc.bias", lambda t: t * torch.nan, "NaN or infinite numbers in fc.bias", "use a file from before"),
    ("fc.bias", lambda t: (t + 1) / 0, "NaN or infinite numbers in fc.bias", "use a file from before"),
    ("hidden2.bn.running_var", lambda t: -t, "negative variance in hidden2.bn.running_var", "save it again"),
    ("fc.weight", lambda t: t.to(torch.int8), "fc.weight as int8", PACKED),
    ("fc.weight", lambda t: t.to_sparse(), "fc.weight as sparse_coo of float32", PACKED),
    ("fc.weight", lambda t: t.to("meta"), "fc.weight as float32 without values", PACKED),
    ("fc.weight", lambda t: torch.zeros(1, 1).expand(2, 10**9), "fc.weight without the numbers of its shape", PACKED),
]


@pytest.mark.parametrize(("name", "spoil", "problem", "remedy"), REFUSALS)
def test_tensors_that_are_not_plain_finite_numbers(
    name: str, spoil: Callable[[Tensor], Tensor], problem: str, remedy: str
) -> None:
    tensors = shaken(build("bn_mlp", classes=2)).state_dict()
    tensors[name] = spoil(tensors[name])
    with pytest.raises(ClassifierError, match=r"^x.pth has ") as error:
        convert(tensors, file="x.pth")
    assert problem in error.value.problem
    assert remedy in error.value.remedy


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"network": "bn_gogglenet"}, "no network is called 'bn_gogglenet'"),
        ({"network": "mlp", "options": {"stem": "small"}}, "mlp has no stem 'small'"),
        ({"options": {"variant": "5x"}}, "no variant of googlenet is called '5x'"),
        ({"format": "cafe"}, "no format is called 'cafe'"),
    ],
)
def test_names_that_do_not_exist(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError) as error:
        convert(build("mlp", classes=2).state_dict(), file="x.pth", **given)
    assert error.value.problem.startswith(problem)


def test_the_tensors_are_copies() -> None:
    """Weights that share memory could not be saved, and the caller's tensors must not change."""
    network = build("mlp", classes=2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    done = converted(network)
    with torch.no_grad():
        done.network.fc.weight.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
