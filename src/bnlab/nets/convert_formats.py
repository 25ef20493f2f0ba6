"""The files of weights that other programs publish: what their networks expect, and how they name their tensors."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Format:
    """A kind of file, and what is known of the networks whose weights it holds."""

    name: str
    summary: str
    preprocessing: Mapping[str, Any] = field(default_factory=dict)  # Keys of a recipe; empty where it is not known.
    network: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `build` that do not follow from the tensors."""
    guessed: bool = False
    """Whether a bnlab network can have the same names and shapes, so that the file does not show which it is."""


_HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_CROP = {"size": 224, "resize": "crop", "crop_fraction": 0.875}
TUTORIAL = Format(
    name="tutorial",
    summary="a file of the GoogLeNet tutorial",
    preprocessing={"size": 224, "resize": "squash", "crop_fraction": 1.0, **_HALVES},
    guessed=True,
)
TORCHVISION = Format(
    name="torchvision",
    summary="torchvision's googlenet",
    preprocessing=_CROP | _HALVES,  # its transform_input turns ImageNet's mean and std into these
    network={"norm_eps": 0.001},
    guessed=True,
)
CAFFE = Format(
    name="caffe",
    summary="BN-Inception with Caffe's names",
    # It expects BGR of 0 to 255 minus (104, 117, 128). `convert` reorders its first filters to RGB; this does the rest.
    preprocessing=_CROP | {"mean": (128 / 255, 117 / 255, 104 / 255), "std": (1 / 255, 1 / 255, 1 / 255)},
)
BNLAB = Format(name="bnlab", summary="the state_dict of a bnlab network")
FORMATS = {kind.name: kind for kind in (TUTORIAL, TORCHVISION, CAFFE, BNLAB)}


def guess_format(options: Mapping[str, Any], *, merged: int) -> Format:
    """Who publishes weights with bnlab's names of a network with these arguments and so many redundant biases."""
    if options["stem"] is not None or options.get("width", 1) != 1:
        return BNLAB
    match options["name"], options["variant"]:
        case "googlenet", "double" | "5x5":
            return TUTORIAL
        case "bn_googlenet", "double" | "5x5" if merged:
            return TUTORIAL
        case "bn_googlenet", "torchvision" if not merged:
            return TORCHVISION
    return BNLAB


# Names under which DataParallel, torch.compile, networks for videos and training frameworks keep a network.
_WRAPPERS = re.compile(r"((module|_orig_mod|base_model|model|net|network|backbone)\.)*")
_HEADS = ("aux1.", "aux2.")  # their last layers are called fc, too

_CAFFE_STEM = {"conv1_7x7_s2": "conv1", "conv2_3x3_reduce": "conv2", "conv2_3x3": "conv3"}
_CAFFE_BRANCHES = {
    "1x1": "branch1",
    "3x3_reduce": "branch2.0",
    "3x3": "branch2.1",
    "double_3x3_reduce": "branch3.0",
    "double_3x3_1": "branch3.1",
    "double_3x3_2": "branch3.2",
    "pool_proj": "branch4.1",
}
_CAFFE_UNITS = _CAFFE_STEM | {
    f"inception_{block}_{theirs}": f"inception{block}.{ours}"
    for block in ("3a", "3b", "3c", "4a", "4b", "4c", "4d", "4e", "5a", "5b")
    for theirs, ours in _CAFFE_BRANCHES.items()
}
_FROM_CAFFE: Mapping[str, str] = {
    f"{theirs}{suffix}": f"{ours}.{layer}"
    for theirs, ours in _CAFFE_UNITS.items()
    for suffix, layer in (("", "conv"), ("_bn", "bn"))
}
_CAFFE_LAST = ("last_linear", "fc", "fc_action", "new_fc", "classifier")
_TO_CAFFE: Mapping[str, str] = {ours: theirs for theirs, ours in _FROM_CAFFE.items()} | {"fc": _CAFFE_LAST[0]}


@dataclass(frozen=True, kw_only=True)
class NamedTensors:
    """The tensors of a network in a file, by bnlab's names."""

    tensors: Mapping[str, Tensor]
    own: Mapping[str, str]  # bnlab's name -> the file's name.
    caffe: bool  # Whether the file names the layers as Caffe's BN-Inception does.
    prefix: str  # The prefix of most names in the file.
    others: tuple[str, ...]  # The file's names of tensors that lie outside of the network.

    def own_name(self, name: str) -> str:
        """The name that the file has, or would have, for a tensor."""
        if name in self.own:
            return self.own[name]
        layer, _, part = name.rpartition(".")
        if self.caffe and layer in _TO_CAFFE:
            name = f"{_TO_CAFFE[layer]}.{part}"
        return self.prefix + name


def networks_in(names: Iterable[str]) -> dict[str, list[str]]:
    """The names of each network in a file by their common prefix, the network with most tensors first.

    A network is recognised by its last layer. A checkpoint may hold several networks, such as an averaged copy, and
    tensors of a loss or a metric.
    """
    names = list(names)
    lasts = [f"{layer}.weight" for layer in _CAFFE_LAST]
    prefixes = {
        name.removesuffix(last) for name in names for last in lasts if name == last or name.endswith(f".{last}")
    }
    prefixes = {prefix for prefix in prefixes if not prefix.endswith(_HEADS)}
    groups: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
    for name in names:
        if around := [prefix for prefix in prefixes if name.startswith(prefix)]:
            groups[max(around, key=len)].append(name)
    more_than_a_layer = {prefix: group for prefix, group in groups.items() if len(group) > 2}
    return dict(sorted(more_than_a_layer.items(), key=lambda item: (-len(item[1]), item[0])))


def rename(tensors: Mapping[str, Tensor], prefix: str = "") -> NamedTensors:
    """Give the tensors whose names begin with the prefix bnlab's names. A name that is not known stays as it is."""
    networks = networks_in(tensors)
    inside = networks.get(prefix) or [name for name in tensors if name.startswith(prefix)]
    stems = {name: _WRAPPERS.sub("", name.removeprefix(prefix), count=1) for name in inside}
    caffe = any(stem.rpartition(".")[0] in _FROM_CAFFE for stem in stems.values())
    own: dict[str, str] = {}
    for name, stem in stems.items():
        ours = _from_caffe(stem) if caffe else stem
        own[name if ours in own else ours] = name  # the second of two with the same name is reported as unknown
    prefixes = Counter(name.removesuffix(stem) for name, stem in stems.items())
    return NamedTensors(
        tensors={ours: tensors[name] for ours, name in own.items()},
        own=own,
        caffe=caffe,
        prefix=prefixes.most_common(1)[0][0] if prefixes else "",
        others=tuple(name for name in tensors if name not in stems),
    )


def _from_caffe(name: str) -> str:
    layer, _, part = name.rpartition(".")
    layer = "fc" if layer in _CAFFE_LAST else _FROM_CAFFE.get(layer, "")
    return f"{layer}.{part}" if layer else name
