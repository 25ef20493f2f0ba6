"""`bnlab net`: list the networks, or count the parameters and multiply-adds of one."""

from dataclasses import dataclass
from typing import Any

import torch

from bnlab.config import Settings, load_settings
from bnlab.errors import UsageError, did_you_mean, printable
from bnlab.nets import build, registry
from bnlab.nets.count import LayerCount, count
from bnlab.options import NetOptions
from bnlab.progress import Progress
from bnlab.training.no_effect import Situation, without_effect

_KEYS = (*registry.ARCHITECTURE_KEYS, "dropout", "in_channels")
_MOST = 10**6  # classes, or channels: far below where torch's count of the weights would overflow


@dataclass(frozen=True, kw_only=True)
class NetResult:
    """A network's layers, and the arguments it was built with: the document of `bnlab net NAME --json`."""

    network: str
    arguments: dict[str, Any]  # of `build`
    classes: int
    size: int  # height and width of the image, in pixels
    parameters: int
    multiply_adds: int
    layers: list[LayerCount]


def run(options: NetOptions, progress: Progress) -> NetResult:
    """Count a network's parameters and multiply-adds; it is built without weights, so this takes no memory."""
    if options.name is None:
        raise UsageError("NAME is missing", "pass the name of a network")
    arguments, settings = _architecture(options)
    with torch.device("meta"):
        network = build(options.name, classes=options.classes, auxiliary=options.auxiliary, **arguments)
    for sentence in without_effect(settings, Situation(recipe=settings.recipe, network=network)):
        progress.warn(sentence)
    layers = count(network, options.size)
    return NetResult(
        network=options.name,
        arguments=dict(network.arguments),
        classes=options.classes,
        size=options.size,
        parameters=sum(layer.parameters for layer in layers),
        multiply_adds=sum(layer.multiply_adds for layer in layers),
        layers=layers,
    )


def listing() -> list[dict[str, Any]]:
    """All networks, the default variant of each first: the document of `bnlab net --json`."""
    return [
        {"name": name, "summary": network.summary, "variants": list(network.variants), "stems": list(network.stems)}
        for name, network in registry.NETWORKS.items()
    ]


def _architecture(options: NetOptions) -> tuple[dict[str, Any], Settings]:
    """The recipe keys as arguments of `build`, with the values that a recipe makes of them, and that recipe."""
    keys = dict(options.recipe_keys)
    for key in keys:
        if key not in _KEYS:
            raise UsageError(f"{printable(key)} does not shape a network", did_you_mean(key, list(_KEYS)))
    for key, number in (("classes", options.classes), ("in_channels", keys.get("in_channels"))):
        if isinstance(number, int) and number > _MOST:
            raise UsageError(f"{key} is {number}", f"it must be at most {_MOST}")
    shaping = {key: value for key, value in keys.items() if key != "in_channels"}
    settings = load_settings("default", shaping)
    return keys | {key: getattr(settings.recipe, key) for key in shaping}, settings
