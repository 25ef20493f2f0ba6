"""What other programs call the tensors of the same networks, put into bnlab's own names and back."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

# What wrappers put before every name: DataParallel, torch.compile, and the video networks' own.
_PREFIXES = ("module.", "_orig_mod.", "base_model.")

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
_CAFFE_UNITS: Mapping[str, str] = _CAFFE_STEM | {
    f"inception_{block}_{theirs}": f"inception{block}.{ours}"
    for block in ("3a", "3b", "3c", "4a", "4b", "4c", "4d", "4e", "5a", "5b")
    for theirs, ours in _CAFFE_BRANCHES.items()
}
_UNITS_IN_CAFFE: Mapping[str, str] = {ours: theirs for theirs, ours in _CAFFE_UNITS.items()}
_CAFFE_LAST = ("last_linear", "fc", "fc_action", "new_fc", "classifier")


@dataclass(frozen=True, kw_only=True)
class Named:
    """The tensors of a file under bnlab's names."""

    tensors: Mapping[str, Tensor]
    own: Mapping[str, str]
    """bnlab's name -> the file's own"""
    caffe: bool
    """whether the file calls the layers as Caffe's BN-Inception does"""
    prefix: str
    """what stands before most names of the file"""

    def own_name(self, name: str) -> str:
        """What the file calls the tensor, or would call it if it had it."""
        if name in self.own:
            return self.own[name]
        return self.prefix + (_to_caffe(name) if self.caffe else name)


def rename(tensors: Mapping[str, Tensor]) -> Named:
    """Find out how a file names its tensors, and name them as bnlab does; a name nobody knows stays as it is."""
    stems = {name: _without_prefixes(name) for name in tensors}
    caffe = any(_caffe_unit(stem) for stem in stems.values())
    own: dict[str, str] = {}
    for name, stem in stems.items():
        ours = _from_caffe(stem) if caffe else stem
        own[name if ours in own else ours] = name  # of two of one name, the second stays unknown, and so is named
    prefixes = Counter(name.removesuffix(stem) for name, stem in stems.items())
    return Named(
        tensors={ours: tensors[name] for ours, name in own.items()},
        own=own,
        caffe=caffe,
        prefix=prefixes.most_common(1)[0][0] if prefixes else "",
    )


def _without_prefixes(name: str) -> str:
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    return name


def _caffe_unit(name: str) -> str | None:
    """bnlab's name of the layer a tensor is of, where Caffe's names have it."""
    return _CAFFE_UNITS.get(name.rpartition(".")[0].removesuffix("_bn"))


def _from_caffe(name: str) -> str:
    layer, _, part = name.rpartition(".")
    if unit := _caffe_unit(name):
        return f"{unit}.{'bn' if layer.endswith('_bn') else 'conv'}.{part}"
    return f"fc.{part}" if layer in _CAFFE_LAST else name


def _to_caffe(name: str) -> str:
    layer, _, part = name.rpartition(".")
    unit, _, kind = layer.rpartition(".")
    if unit in _UNITS_IN_CAFFE:
        return f"{_UNITS_IN_CAFFE[unit]}{'_bn' if kind == 'bn' else ''}.{part}"
    return f"{_CAFFE_LAST[0]}.{part}" if layer == "fc" else name
