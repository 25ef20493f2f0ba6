"""The kinds of files that weights come in, and what is known of the networks they are of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Format:
    """A kind of file, and what is known of the networks it comes from."""

    name: str
    summary: str
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    """how its network sees a photo, as keys of a recipe; nothing where that is not known"""
    network: Mapping[str, Any] = field(default_factory=dict)
    """arguments of `build` that no tensor tells"""
    guessed: bool = False
    """a bnlab network of that shape has the same names: nothing in the file tells them apart"""


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
    # It sees BGR of 0 to 255 less (104, 117, 128); its first filters are turned to RGB, and the view does the rest.
    preprocessing=_CROP | {"mean": (128 / 255, 117 / 255, 104 / 255), "std": (1 / 255, 1 / 255, 1 / 255)},
)
BNLAB = Format(name="bnlab", summary="the state_dict of a bnlab network")
FORMATS = {kind.name: kind for kind in (TUTORIAL, TORCHVISION, CAFFE, BNLAB)}


def guess(network: str, options: Mapping[str, Any], *, merged: int) -> Format:
    """Who publishes such a network under bnlab's names: built with these options, with so many redundant biases."""
    if options["stem"] is not None or options.get("width", 1) != 1:
        return BNLAB
    match network, options["variant"]:
        case "googlenet", "double" | "5x5":
            return TUTORIAL
        case "bn_googlenet", "double" | "5x5" if merged:
            return TUTORIAL
        case "bn_googlenet", "torchvision" if not merged:
            return TORCHVISION
    return BNLAB
