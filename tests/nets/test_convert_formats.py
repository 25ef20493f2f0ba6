"""Names of tensors in published files, and the format that a file is taken for."""

from typing import Any

import pytest
import torch

from bnlab.nets.convert_formats import FORMATS, guess_format, networks_in, rename


@pytest.mark.parametrize(
    ("prefix", "theirs", "ours"),
    [
        ("", "conv1_7x7_s2.weight", "conv1.conv.weight"),
        ("base_model.", "conv2_3x3_bn.bias", "conv3.bn.bias"),
        ("module._orig_mod.", "inception_3c_double_3x3_2.weight", "inception3c.branch3.2.conv.weight"),
    ],
)
def test_caffe_names_become_ours_and_back(prefix: str, theirs: str, ours: str) -> None:
    weight = torch.zeros(1)
    found = rename({prefix + theirs: weight, f"{prefix}last_linear.bias": torch.ones(1)})
    assert found.caffe
    assert found.prefix == prefix
    assert found.tensors.keys() == {ours, "fc.bias"}
    assert found.tensors[ours] is weight
    assert found.own_name(ours) == prefix + theirs
    assert found.own_name("inception5b.branch1.conv.bias") == f"{prefix}inception_5b_1x1.bias"  # not in the file


def test_our_names_lose_only_their_prefix() -> None:
    found = rename({"module.conv1.conv.weight": torch.zeros(1), "module.own.name": torch.zeros(1)})
    assert not found.caffe
    assert found.tensors.keys() == {"conv1.conv.weight", "own.name"}
    assert found.own_name("fc.bias") == "module.fc.bias"


def test_the_second_of_two_tensors_with_one_name_keeps_its_own() -> None:
    first, second = torch.zeros(1), torch.ones(1)
    found = rename({"fc.bias": first, "module.fc.bias": second})
    assert found.tensors["fc.bias"] is first
    assert found.tensors["module.fc.bias"] is second


@pytest.mark.parametrize("wrapper", ["model.", "net.", "network.", "backbone.module.", "_orig_mod.model."])
def test_wrappers_are_no_part_of_a_name(wrapper: str) -> None:
    """The last layer may lie outside of the wrapper."""
    found = rename({f"{wrapper}conv1.conv.weight": torch.zeros(1), "fc.weight": torch.zeros(1)})
    assert found.tensors.keys() == {"conv1.conv.weight", "fc.weight"}
    assert found.others == ()


def test_networks_are_found_by_their_last_layers() -> None:
    parts = ("conv1.conv.weight", "aux1.fc.weight", "fc.weight", "fc.bias")
    names = [*(f"lit.net.{part}" for part in parts), *(f"ema.{part}" for part in parts[1:]), "loss.weight"]
    assert networks_in(names) == {"lit.net.": [f"lit.net.{p}" for p in parts], "ema.": [f"ema.{p}" for p in parts[1:]]}
    assert networks_in(["head.fc.weight", "head.fc.bias", "body.conv1.conv.weight"]) == {}  # a layer is no network
    within = [*parts, *(f"ema.{part}" for part in parts)]
    assert networks_in(within) == {"": list(parts), "ema.": within[4:]}
    tensors = dict.fromkeys(names, torch.zeros(1))
    found = rename(tensors, "lit.net.")
    assert found.tensors.keys() == set(parts)
    assert found.others == (*names[4:7], "loss.weight")


def test_a_file_without_tensors_has_no_prefix() -> None:
    assert rename({}).prefix == ""


@pytest.mark.parametrize(
    ("name", "variant", "merged", "more", "expected"),
    [
        ("googlenet", "5x5", 0, {}, "tutorial"),
        ("bn_googlenet", "double", 3, {}, "tutorial"),
        ("bn_googlenet", "double", 0, {}, "bnlab"),
        ("bn_googlenet", "torchvision", 0, {}, "torchvision"),
        ("bn_googlenet", "torchvision", 3, {}, "bnlab"),
        ("bn_googlenet", "torchvision", 0, {"width": 0.5}, "bnlab"),
        ("bn_googlenet", "torchvision", 0, {"stem": "small"}, "bnlab"),
        ("bn_inception", "paper", 0, {}, "bnlab"),
    ],
)
def test_the_format_follows_from_the_network(
    name: str, variant: str, merged: int, more: dict[str, Any], expected: str
) -> None:
    options = {"name": name, "variant": variant, "stem": None, **more}
    assert guess_format(options, merged=merged) is FORMATS[expected]
