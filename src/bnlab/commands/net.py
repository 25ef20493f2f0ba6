"""`bnlab net`: the networks there are, and how large one is."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bnlab.config import load_settings
from bnlab.errors import UsageError, did_you_mean, printable
from bnlab.nets import build, registry
from bnlab.nets.count import LayerCount, count
from bnlab.progress import Progress

_KEYS = (*registry.ARCHITECTURE_KEYS, "dropout", "in_channels")
_MOST = 10**6  # classes, or channels: far below where torch's count of the weights would overflow


@dataclass(frozen=True, kw_only=True)
class NetSettings:
    """What `bnlab net NAME` is told."""

    name: str
    """of the catalogue"""
    size: int = 224
    """height and width of the image, in pixels"""
    classes: int = 1000
    auxiliary: bool = False
    """with GoogLeNet's two auxiliary classifiers"""
    options: Mapping[str, Any] = field(default_factory=dict)
    """keys of a recipe that shape the network, and in_channels; the network's own unless given"""


@dataclass(frozen=True, kw_only=True)
class NetResult:
    """A network's layers, and what it was built with."""

    network: str
    arguments: Mapping[str, Any]
    """of `build`"""
    classes: int
    size: int
    """height and width of the image, in pixels"""
    auxiliary: bool
    """whether auxiliary heads are among the layers"""
    layers: list[LayerCount]

    @property
    def parameters(self) -> int:
        """Of all layers."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def multiply_adds(self) -> int:
        """Of all layers, for one image."""
        return sum(layer.multiply_adds for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """The document of `bnlab net NAME --json`."""
        return {
            "network": self.network,
            "arguments": dict(self.arguments),
            "classes": self.classes,
            "size": self.size,
            "parameters": self.parameters,
            "multiply_adds": self.multiply_adds,
            "layers": [asdict(layer) for layer in self.layers],
        }


def run(settings: NetSettings, progress: Progress) -> NetResult:
    """Count a network's parameters and multiply-adds; it is built without weights, so this takes no memory.

    Raises:
        UsageError: there is no such network, it cannot be built so, or the image is too small for it.
    """
    options = _checked(settings)
    with torch.device("meta"):
        network = build(settings.name, classes=settings.classes, auxiliary=settings.auxiliary, **options)
    return NetResult(
        network=settings.name,
        arguments=network.arguments,
        classes=settings.classes,
        size=settings.size,
        auxiliary=settings.auxiliary,
        layers=count(network, settings.size),
    )


def listing() -> list[dict[str, Any]]:
    """The networks of the catalogue, the default variant of each first: the document of `bnlab net --json`."""
    return [
        {"name": name, "summary": network.summary, "variants": list(network.variants), "stems": list(network.stems)}
        for name, network in registry.CATALOGUE.items()
    ]


def _checked(settings: NetSettings) -> dict[str, Any]:
    """The options as `build` takes them; those a recipe has, as a recipe takes them."""
    options = dict(settings.options)
    for key in options:
        if key not in _KEYS:
            raise UsageError(f"{printable(key)} does not shape a network", did_you_mean(key, list(_KEYS)))
    for key, number in (("classes", settings.classes), ("in_channels", options.get("in_channels"))):
        if isinstance(number, int) and number > _MOST:
            raise UsageError(f"{key} {number} cannot be", f"give at most {_MOST}")
    shaping = {key: value for key, value in options.items() if key != "in_channels"}
    recipe = load_settings("default", shaping).recipe
    return options | {key: getattr(recipe, key) for key in shaping}
