"""Fine-tuning: a training that starts from the weights of a classifier file."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from bnlab.classifier.file import file_of, load_network
from bnlab.classifier.seen import UNKNOWN_HISTORY, Ancestor, History
from bnlab.config import Settings, with_changes
from bnlab.data.photos import Photos
from bnlab.errors import UsageError, printable
from bnlab.files import write_json
from bnlab.nets.network import TableNetwork
from bnlab.nets.registry import ARCHITECTURE_KEYS
from bnlab.progress import Progress
from bnlab.runs import Run

BACKBONE_LR_FACTOR = 0.1  # unless set: the backbone is trained already, and the last layer is new
_SAME_SPLIT = "split as it was: pass the earlier run's folder or split.csv as DATA, or the same val and split_seed"
_LAST_LAYER = ("fc.weight", "fc.bias")


def inherit_from_init(settings: Settings) -> Settings:
    """Take the architecture and the colour statistics from the file in `init`; its size and pixel range unless set.

    If `init` is the folder of a run, it becomes the file that is read.

    Raises:
        ClassifierError: the file cannot be read.
        UsageError: the user set the architecture or the colour statistics to something else.
    """
    recipe = settings.recipe
    if recipe.init is None:
        return settings
    file = file_of(recipe.init)
    settings, name = with_changes(settings, {"init": str(file)}, settings.origin["init"]), printable(file)
    network, card = load_network(file)
    preprocessing = card.preprocessing
    inherited: dict[str, Any] = {"network": card.network, "mean": preprocessing.mean, "std": preprocessing.std}
    inherited |= {key: value for key, value in network.arguments.items() if key in ARCHITECTURE_KEYS}
    for key in [key for key in inherited if key in settings.chosen]:
        own = getattr(recipe, key)
        if key == "norm_momentum" or (key == "norm" and _same_tensors(own, inherited[key])):
            del inherited[key]
        elif own != inherited[key]:
            raise UsageError(f"init {name} has the {key} {inherited[key]}, not {own}", f"leave {key} out")
    unless_set = {key: getattr(preprocessing, key) for key in ("size", "resize", "crop_fraction")}
    unless_set["backbone_lr_factor"] = BACKBONE_LR_FACTOR
    inherited |= {key: value for key, value in unless_set.items() if key not in settings.origin}
    if "pixel_range" not in settings.chosen:  # that a shipped recipe has none is no choice
        inherited["pixel_range"] = preprocessing.pixel_range
    return with_changes(settings, inherited, "init")


def load_pretrained(network: TableNetwork, classes: Sequence[str], init: str, progress: Progress) -> History:
    """Load the weights of a classifier file into the network; those of the last layer only if the classes are the same.

    Returns:
        The trainings that these weights come from, and the photos that they saw.

    Raises:
        ClassifierError: a tensor of the file is missing or does not fit.
    """
    trained, card = load_network(Path(init))
    tensors, name = trained.state_dict(), printable(init)
    known = sorted(card.classes) == sorted(classes)
    if known:  # the rows of the last layer, in the order of `classes`
        order = torch.tensor([card.classes.index(label) for label in classes])
        tensors |= {key: tensors[key][order] for key in _LAST_LAYER}
    else:
        tensors |= {key: network.get_parameter(key).detach() for key in _LAST_LAYER}
    network.load_state_dict(tensors, strict=False)  # the file has no auxiliary heads
    new = "" if known else f"; the last layer is new, for its classes were {', '.join(map(printable, card.classes))}"
    progress.note(f"starting from {name}, with its network and preprocessing{new}")
    latest = Ancestor(split_sha256=card.split_sha256, photos=card.photos, classes=card.classes)
    return History(ancestors=(*card.ancestors, latest), seen=card.seen)


def report_seen(photos: Photos, history: History, progress: Progress) -> None:
    """Warn of photos in val and test that the file in `init`, or one that it started from, has seen."""
    for split in ("val", "test"):
        count = history.seen.count(photos.in_split(split))
        if split == "val":  # that the best epoch is chosen by the same val as before is as it should be
            count = replace(count, val=0)
        if count.train or count.val:
            for sentence in count.sentences("the file in init was", f"photos of {split}"):
                progress.warn(f"{sentence}, so the accuracy on {split} may be too high: {_SAME_SPLIT}")
    if not history.seen.complete:
        progress.note(
            "the file in init does not say which photos it was trained on: "
            "if some of them are in val or test, the accuracy there may be too high"
        )


def write_history(run: Run, history: History) -> None:
    """Keep the history in the run's ancestors.json, for a resume that no longer finds the file in `init`."""
    write_json(run.ancestors, asdict(history))


def read_history(run: Run) -> History:
    """The history that `write_history` kept. If it is missing or cannot be read, what was seen counts as unknown."""
    try:
        return TypeAdapter(History).validate_json(run.ancestors.read_bytes())
    except (OSError, ValueError):
        return UNKNOWN_HISTORY


def _same_tensors(*norms: str | None) -> bool:
    """Whether layers of these kinds have the same tensors, so that each can load the other's weights."""
    return {str(norm).partition(":")[0] for norm in norms} <= {"batch", "sync", "ghost"}
