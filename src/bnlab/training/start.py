"""What a training starts from: a new network as the recipe has it, or the weights of a classifier file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bnlab.classifier.file import check_fit, read_classifier
from bnlab.config import Recipe, Settings, with_changes
from bnlab.errors import UsageError, printable
from bnlab.nets import build
from bnlab.nets.catalogue import SHAPE, has_row
from bnlab.nets.freeze import Frozen, freeze
from bnlab.nets.initialise import check_unnormalised
from bnlab.nets.network import TableNetwork
from bnlab.nets.tables import Auxiliary
from bnlab.progress import Progress

TRUNK_RATE = 0.1  # of fine-tuning, unless set: the trunk knows something already, and the last layer nothing
_HEAD = ("fc.weight", "fc.bias")
_YOURS_TO_CHANGE = ("norm", "norm_momentum")  # layers of other kinds may take the same weights


def new_network(recipe: Recipe, *, classes: int) -> tuple[TableNetwork, Frozen]:
    """The recipe's network, and what of it is frozen.

    Raises:
        UsageError: there is no such network, or it cannot be built or frozen so.
    """
    options: dict[str, Any] = {key: getattr(recipe, key) for key in (*SHAPE, "dropout", "initialisation", "seed")}
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
        network, _ = new_network(recipe, classes=2)
    if recipe.data_dependent:
        check_unnormalised(network)


def adopt(settings: Settings) -> Settings:
    """Take the network and the colour normalisation from the file in `init`, which its weights expect.

    Raises:
        ClassifierError: the file cannot be read.
        UsageError: the user set one of them otherwise.
    """
    recipe = settings.recipe
    if recipe.init is None:
        return settings
    _, card = read_classifier(Path(recipe.init))
    adopted: dict[str, Any] = {"network": card.network, "mean": card.view.mean, "std": card.view.std}
    adopted |= {key: card.arguments[key] for key in SHAPE if key in card.arguments}
    for key in list(adopted):
        if key in settings.own and getattr(recipe, key) != adopted[key]:
            if key in _YOURS_TO_CHANGE:
                del adopted[key]
                continue
            raise UsageError(
                f"--init {printable(recipe.init)} has the {key} {adopted[key]}, not {getattr(recipe, key)}",
                f"leave {key} out",
            )
    if "trunk_rate" not in settings.origin:
        adopted["trunk_rate"] = TRUNK_RATE
    return with_changes(settings, adopted, "init")


def load_into(network: TableNetwork, classes: Sequence[str], init: str, progress: Progress) -> None:
    """Give the network the weights of a classifier file; the last layer too where the classes are the same.

    Raises:
        ClassifierError: a tensor of the file is missing or does not fit.
    """
    tensors, card = read_classifier(Path(init))
    known = sorted(card.classes) == sorted(classes)
    if known:  # the rows of the last layer, in the order of `classes`
        order = torch.tensor([card.classes.index(label) for label in classes])
        tensors |= {name: tensors[name][order] for name in _HEAD if name in tensors}
    else:
        tensors |= {name: network.get_parameter(name).detach() for name in _HEAD}
    check_fit(tensors, network.inference_state(), printable(init), card.network)
    network.load_state_dict(tensors, strict=False)  # the file has no auxiliary heads
    new = "" if known else f"; the last layer is new, for its classes were {', '.join(map(printable, card.classes))}"
    progress.note(f"starting from {printable(init)}, with its network, mean and std{new}")
