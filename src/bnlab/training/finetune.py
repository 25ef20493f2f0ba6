"""What a training starts from: a new network as the recipe has it, or the weights of a classifier file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bnlab.classifier.file import check_fit, network_from_card, read_classifier
from bnlab.config import Settings, with_changes
from bnlab.errors import UsageError, printable
from bnlab.nets import build
from bnlab.nets.blocks import is_normalised
from bnlab.nets.freeze import Frozen, freeze
from bnlab.nets.initialise import check_unnormalised
from bnlab.nets.network import TableNetwork
from bnlab.nets.registry import ARCHITECTURE_KEYS, has_row
from bnlab.nets.tables import Auxiliary
from bnlab.progress import Progress
from bnlab.recipe import Recipe

BACKBONE_LR_FACTOR = 0.1  # of fine-tuning, unless set: the backbone knows something already, and the last layer nothing
_HEAD = ("fc.weight", "fc.bias")


def new_network(recipe: Recipe, *, classes: int) -> tuple[TableNetwork, Frozen]:
    """The recipe's network, and what of it is frozen.

    Raises:
        UsageError: there is no such network, or it cannot be built or frozen so.
    """
    options: dict[str, Any] = {
        key: getattr(recipe, key) for key in (*ARCHITECTURE_KEYS, "dropout", "initialisation", "seed")
    }
    heads = recipe.auxiliary and has_row(recipe.network, Auxiliary)
    network = build(recipe.network, classes=classes, auxiliary=heads, **options)
    return network, freeze(network, recipe.freeze, norms=recipe.freeze_bn)


def check_network(recipe: Recipe) -> None:
    """See that the network can be built and started as the recipe says, before anything else is done.

    Raises:
        UsageError: it cannot.
    """
    if recipe.init is None and (recipe.freeze != "none" or recipe.freeze_bn):
        what = f"freeze {recipe.freeze}" if recipe.freeze != "none" else "freeze_bn"
        raise UsageError(f"{what} would freeze random weights", "give --init FILE, the classifier to start from")
    with torch.device("meta"):
        network, frozen = new_network(recipe, classes=2)
    network.check_size(recipe.size, recipe.size)
    if recipe.freeze_bn and not frozen.norms:
        raise UsageError(f"{network.name} has no normalisation layers to freeze", "leave freeze_bn out")
    if recipe.lsuv_init:
        check_unnormalised(network)


def without_effect(settings: Settings, network: TableNetwork) -> list[str]:
    """A sentence for each of the user's own keys that changes nothing of this network's training."""
    recipe, own = settings.recipe, settings.own
    sentences = settings.without_effect()
    if recipe.auxiliary and not network.heads:
        sentences.append(f"auxiliary has no effect: {recipe.network} has no auxiliary heads")
    if not is_normalised(network):
        sentences += [
            f"{key} has no effect: {recipe.network} is not normalised"
            for key in ("norm_eps", "norm_momentum", "conv_bias")
            if key in own
        ]
    if recipe.freeze == "backbone":
        sentences += [
            f"{key} has no effect on a backbone that is frozen"
            for key in ("backbone_lr_factor", "auxiliary")
            if key in own
        ]
    return sentences


def inherit_from_init(settings: Settings) -> Settings:
    """Take the network and the colours from the file in `init`, which its weights expect; its size, unless set.

    Raises:
        ClassifierError: the file cannot be read.
        UsageError: the user set one of them otherwise.
    """
    recipe = settings.recipe
    if recipe.init is None:
        return settings
    name = printable(recipe.init)
    _, card = read_classifier(Path(recipe.init))
    adopted: dict[str, Any] = {"network": card.network, "mean": card.preprocessing.mean, "std": card.preprocessing.std}
    adopted |= {
        key: value for key, value in network_from_card(card, name).arguments.items() if key in ARCHITECTURE_KEYS
    }
    for key in [key for key in adopted if key in settings.chosen]:
        own = getattr(recipe, key)
        if key == "norm_momentum" or (key == "norm" and _same_tensors(own, adopted[key])):
            del adopted[key]
        elif own != adopted[key]:
            raise UsageError(f"--init {name} has the {key} {adopted[key]}, not {own}", f"leave {key} out")
    preprocessing = {
        "size": card.preprocessing.size,
        "resize": card.preprocessing.resize,
        "crop_fraction": card.preprocessing.crop_fraction,
    }
    unless_set = preprocessing | {"backbone_lr_factor": BACKBONE_LR_FACTOR}
    adopted |= {key: value for key, value in unless_set.items() if key not in settings.origin}
    return with_changes(settings, adopted, "init")


def load_pretrained(network: TableNetwork, classes: Sequence[str], init: str, progress: Progress) -> None:
    """Give the network the weights of a classifier file; the last layer too where the classes are the same.

    Raises:
        ClassifierError: a tensor of the file is missing or does not fit.
    """
    tensors, card = read_classifier(Path(init))
    name = printable(init)
    check_fit(tensors, network_from_card(card, name).state_dict(), name, card.network)
    known = sorted(card.classes) == sorted(classes)
    if known:  # the rows of the last layer, in the order of `classes`
        order = torch.tensor([card.classes.index(label) for label in classes])
        tensors |= {key: tensors[key][order] for key in _HEAD}
    else:
        tensors |= {key: network.get_parameter(key).detach() for key in _HEAD}
    network.load_state_dict(tensors, strict=False)  # the file has no auxiliary heads
    new = "" if known else f"; the last layer is new, for its classes were {', '.join(map(printable, card.classes))}"
    progress.note(f"starting from {name}, with its network and what it sees{new}")


def _same_tensors(*norms: str | None) -> bool:
    """Whether layers of these kinds may take each other's weights."""
    return {str(norm).partition(":")[0] for norm in norms} <= {"batch", "sync", "ghost"}
