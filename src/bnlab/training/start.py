"""Fine-tuning: a network that starts from a classifier file instead of from random weights."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bnlab.classifier.card import Card
from bnlab.classifier.file import read_classifier
from bnlab.config import Recipe, Settings
from bnlab.errors import ClassifierError, UsageError, printable
from bnlab.nets.build import TableNetwork
from bnlab.progress import Progress

_HEAD = ("fc.weight", "fc.bias")


def adopt(settings: Settings) -> Settings:
    """Take the network and the colour normalisation from the file in `init`, which its weights expect.

    Raises:
        ClassifierError: the file cannot be read.
        UsageError: the user chose another network.
    """
    recipe = settings.recipe
    if recipe.init is None:
        return settings
    _, card = read_classifier(Path(recipe.init))
    if "network" in settings.own and recipe.network != card.network:
        raise UsageError(
            f"--init {printable(recipe.init)} holds a {card.network}, not a {recipe.network}", "leave --network out"
        )
    adopted = {"network": card.network, "mean": card.view.mean, "std": card.view.std}
    return Settings(recipe=Recipe.model_validate(recipe.model_dump() | adopted), own=settings.own)


def load_into(network: TableNetwork, classes: Sequence[str], init: str, progress: Progress) -> None:
    """Give the network the weights of a classifier file; the last layer too where the classes are the same.

    Raises:
        ClassifierError: a tensor of the file does not fit.
    """
    tensors, card = read_classifier(Path(init))
    own = network.inference_state()
    body = {name: tensor for name, tensor in tensors.items() if name not in _HEAD}
    for name, tensor in body.items():
        if name not in own or own[name].shape != tensor.shape:
            raise ClassifierError(f"{printable(init)} has a tensor {name} that does not fit", "train it again")
    known = sorted(card.classes) == sorted(classes)
    head = _head_by_name(tensors, card, classes) if known else {}
    network.load_state_dict(body | head, strict=False)
    new = "" if known else f"; the last layer is new, for its classes were {', '.join(map(printable, card.classes))}"
    progress.note(
        f"starting from {printable(init)}: {len(body) + len(head)} tensors, with its network, mean and std{new}"
    )


def _head_by_name(tensors: dict[str, Tensor], card: Card, classes: Sequence[str]) -> dict[str, Tensor]:
    """The rows of the last layer, in the order of `classes`."""
    order = torch.tensor([card.classes.index(label) for label in classes])
    return {name: tensors[name][order] for name in _HEAD}
