"""Builds a training from a recipe and photos: network, optimiser, EMA, loader and caches.

Commands, studies and the learning-rate finder all build their trainings here. `prepare` opens the photos and builds the
network before anything is written; `build_context` assembles what the loop needs.
"""

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bnlab.classifier.file import Card
from bnlab.classifier.seen import NO_HISTORY, History
from bnlab.config import Settings, with_changes
from bnlab.data.augment import augment
from bnlab.data.cache import Cache, choose_cache
from bnlab.data.dataset import Dataset, open_training_data
from bnlab.data.loader import TrainingLoader, number_of_batches
from bnlab.data.photo_file import PhotoReader
from bnlab.data.preprocess import Preprocessing, normalise
from bnlab.data.scan import report_refused
from bnlab.data.split_csv import report_missing_classes
from bnlab.errors import UsageError
from bnlab.machine import choose_device, fast_precision, free_memory
from bnlab.nets import build, lsuv_init
from bnlab.nets.build import move_network
from bnlab.nets.freeze import Frozen, freeze
from bnlab.nets.initialise import check_unnormalised
from bnlab.nets.network import TableNetwork
from bnlab.nets.registry import ARCHITECTURE_KEYS, has_row
from bnlab.nets.tables import Auxiliary
from bnlab.progress import Progress
from bnlab.recipe import Recipe
from bnlab.training.ema import EMA
from bnlab.training.finetune import inherit_from_init, load_pretrained, report_seen
from bnlab.training.no_effect import Situation, without_effect
from bnlab.training.optimizer import make_optimizer, set_learning_rate
from bnlab.training.schedule import Plan

_USUAL_ASPECT = 1.5  # of photos whose long side is not known yet
_USUAL_PIXELS = 500_000  # of photos that are cached at their own size


class Stateful(Protocol):
    """What a checkpoint can save and restore, such as a network or an optimiser."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> object: ...


@dataclass(frozen=True, kw_only=True)
class PreparedTraining:
    """What a training starts from. Nothing has been written yet."""

    settings: Settings  # with the settings that fine-tuning takes from the file in `init`
    device: str
    dataset: Dataset
    network: TableNetwork  # on the CPU, with its initial weights
    frozen: Frozen
    history: History  # of the file in `init`


@dataclass(frozen=True, kw_only=True)
class TrainingContext:
    """Everything that a training step uses."""

    dataset: Dataset
    network: TableNetwork
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    loader: TrainingLoader
    recipe: Recipe
    preprocessing: Preprocessing
    device: str
    forward: Callable[[Tensor], Tensor | tuple[Tensor, ...]]  # the network, compiled if the recipe asks for it

    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint saves and restores, by its name in state.pt."""
        parts: dict[str, Stateful] = {"network": self.network, "optimizer": self.optimizer}
        return parts | ({"ema": self.ema.model} if self.ema else {})


def prepare(data: Path, settings: Settings, *, strict: bool, progress: Progress) -> PreparedTraining:
    """Open DATA, build the network, and warn about the user's settings that have no effect.

    Raises:
        BnlabError: DATA or the recipe cannot be used.
    """
    settings = inherit_from_init(settings)
    device = choose_device(settings.recipe.device)
    if settings.recipe.precision == "auto":
        settings = with_changes(settings, {"precision": fast_precision(device)}, "machine")
    recipe = settings.recipe
    check_network(recipe)
    reader = PhotoReader(pixel_range=recipe.pixel_range, max_megapixels=recipe.max_megapixels)
    dataset = open_training_data(data, val=recipe.val, seed=recipe.split_seed, progress=progress, reader=reader)
    report_refused(dataset.refused, strict=strict, progress=progress)
    reader.report(progress)
    report_missing_classes(dataset.photos, "val", progress)
    network, frozen = new_network(recipe, classes=len(dataset.classes))
    photos = len(dataset.in_split("train"))
    steps = number_of_batches(photos, recipe.batch_size * recipe.accumulate)
    situation = Situation(
        recipe=recipe,
        network=network,
        batch=-(-photos // (steps * recipe.accumulate)),
        plan=None if recipe.time or recipe.plan else Plan.of(recipe, steps),
        own_val=dataset.own_val,
    )
    for sentence in without_effect(settings, situation):
        progress.warn(sentence)
    history = NO_HISTORY
    if recipe.init is not None:
        history = load_pretrained(network, dataset.classes, recipe.init, progress)
        report_seen(dataset.photos, history, progress)
    return PreparedTraining(
        settings=settings, device=device, dataset=dataset, network=network, frozen=frozen, history=history
    )


def build_context(
    recipe: Recipe, network: TableNetwork, dataset: Dataset, device: str, cache: Cache | None = None
) -> TrainingContext:
    """Move a network to its device and add all that training it takes. `cache` is for photos that training crops."""
    network = move_network(network, device)
    return TrainingContext(
        dataset=dataset,
        network=network,
        optimizer=make_optimizer(network, recipe),
        ema=EMA(network, recipe.ema) if recipe.ema else None,
        loader=TrainingLoader(
            dataset.in_split("train"),
            dataset.classes,
            short_side=cached_side(recipe),
            augment=partial(
                augment,
                area=recipe.crop_area,
                aspect=recipe.crop_aspect,
                flip=recipe.flip,
                color_jitter=recipe.color_jitter,
            ),
            shuffle=recipe.shuffle,
            batch_size=recipe.batch_size * recipe.accumulate,
            seed=recipe.seed,
            workers=recipe.workers,
            cache=cache,
            reader=replace(dataset.reader, pixel_range=recipe.pixel_range, max_megapixels=recipe.max_megapixels),
        ),
        recipe=recipe,
        preprocessing=preprocessing_of(recipe),
        device=device,
        forward=torch.compile(network) if recipe.compile else network,
    )


def scratch_copy(context: TrainingContext) -> TrainingContext:
    """A copy for trying steps out: they cost what they cost in training, at a learning rate of 0."""
    network = copy.deepcopy(context.network).train()
    scratch = build_context(context.recipe, network, context.dataset, context.device)
    set_learning_rate(scratch.optimizer, 0.0)  # at a higher one the weights could become infinite
    return scratch


def new_network(recipe: Recipe, *, classes: int, **changes: Any) -> tuple[TableNetwork, Frozen]:
    """The network of the recipe with initial weights, and which of its parts are frozen.

    `changes` are arguments of `build` that take the place of what the recipe says.

    Raises:
        UsageError: there is no such network, or it cannot be built or frozen in this way.
    """
    options: dict[str, Any] = {
        key: getattr(recipe, key) for key in (*ARCHITECTURE_KEYS, "dropout", "initialisation", "seed")
    }
    heads = recipe.auxiliary and has_row(recipe.network, Auxiliary)
    network = build(recipe.network, classes=classes, auxiliary=heads, **options | changes)
    return network, freeze(network, recipe.freeze, norms=recipe.freeze_bn)


def check_network(recipe: Recipe) -> None:
    """Raise a UsageError unless the network can be built and initialised as the recipe says; this allocates nothing."""
    if recipe.init is None and (recipe.freeze != "none" or recipe.freeze_bn):
        what = f"freeze {recipe.freeze}" if recipe.freeze != "none" else "freeze_bn"
        raise UsageError(f"{what} would freeze random weights", "give init, the classifier to start from")
    with torch.device("meta"):
        network, frozen = new_network(recipe, classes=2)
    network.check_size(recipe.size, recipe.size)
    if recipe.freeze_bn and not frozen.norms:
        raise UsageError(f"{network.name} has no normalisation layers to freeze", "leave freeze_bn out")
    if recipe.lsuv_init:
        check_unnormalised(network)


def init_on_first_batch(context: TrainingContext) -> None:
    """Scale the layers of a new network on the first batch (LSUV), if the recipe asks for it."""
    recipe = context.recipe
    if recipe.lsuv_init and recipe.init is None:
        pixels, _ = next(context.loader.epoch(0, recipe.size))
        pixels = pixels[: recipe.batch_size]  # of a step that accumulates batches
        lsuv_init(context.network, normalise(torch.from_numpy(pixels).to(context.device), context.preprocessing))
        if context.ema:
            context.ema.restart(context.network)


def card_of(context: TrainingContext) -> Card:
    """What inference needs to know of the network."""
    return Card(
        network=context.recipe.network,
        arguments=context.network.arguments,
        classes=context.dataset.classes,
        preprocessing=context.preprocessing,
    )


def preprocessing_of(recipe: Recipe) -> Preprocessing:
    """How validation and inference preprocess a photo."""
    keys = ("size", "resize", "crop_fraction", "mean", "std", "flip_tta", "pixel_range")
    return Preprocessing(**{key: getattr(recipe, key) for key in keys})


def cached_side(recipe: Recipe) -> int:
    """The short side of the photos that training crops from, in pixels; 0 for photos at their own size."""
    return round(recipe.pre_resize * recipe.size)


def make_caches(folder: Path, recipe: Recipe, dataset: Dataset) -> tuple[Cache, Cache, Cache]:
    """Caches that together take at most what the recipe allows; on disk they lie in `folder`.

    The first is for the photos that training crops from, the second for the training photos that population statistics
    are measured on, preprocessed as for inference, and the third for val.
    """
    limit = int(recipe.cache_gigabytes * 2**30)
    memory = 0 if recipe.cache == "none" else limit or int(0.4 * free_memory())
    disk = limit or shutil.disk_usage(folder).free // 2
    num_train, num_val = len(dataset.in_split("train")), len(dataset.in_split("val"))
    num_sample = min(recipe.recalibration_images, num_train)
    side, preprocessed = cached_side(recipe), recipe.size**2 * 3  # bytes of a photo
    for_val = min(memory, num_val * preprocessed)
    for_sample = min(memory - for_val, num_sample * preprocessed)
    memory -= for_val + for_sample
    if limit:
        disk -= for_val + for_sample
    estimate = int(side * side * 3 * _USUAL_ASPECT) if side else _USUAL_PIXELS * 3
    train = choose_cache(recipe.cache, num_train, memory=memory, disk=disk, estimate=estimate, folder=folder)
    return train, Cache(num_sample, for_sample), Cache(num_val, for_val)
