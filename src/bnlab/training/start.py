"""Fine-tuning: a network that starts from a classifier file instead of from random weights."""

from collections.abc import Sequence
from pathlib import Path

import torch

from bnlab.classifier.file import check_fit, read_classifier
from bnlab.config import Settings, with_changes
from bnlab.errors import UsageError, printable
from bnlab.nets.build import TableNetwork
from bnlab.progress import Progress

_HEAD = ("fc.weight", "fc.bias")
_ADOPTED = ("network", "mean", "std")


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
    adopted = {"network": card.network, "mean": card.view.mean, "std": card.view.std}
    for key in _ADOPTED:
        if key in settings.own and getattr(recipe, key) != adopted[key]:
            raise UsageError(
                f"--init {printable(recipe.init)} has the {key} {adopted[key]}, not {getattr(recipe, key)}",
                f"leave {key} out",
            )
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
