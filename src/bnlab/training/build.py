"""What a training is made of, as the recipe has it: the photos' caches, the loader, the optimiser, the average."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bnlab.data.cache import Cache, choose_cache
from bnlab.data.dataset import Dataset
from bnlab.data.loader import TrainingLoader
from bnlab.data.preprocess import Preprocessing
from bnlab.health.bn_monitor import BNMonitor
from bnlab.machine import free_memory
from bnlab.nets.network import TableNetwork
from bnlab.recipe import Recipe
from bnlab.runs import Run
from bnlab.training.ema import EMA
from bnlab.training.loop import TrainingContext
from bnlab.training.optimizer import make_optimizer, set_learning_rate

_WINDOW, _EVERY = 8, 64  # steps that the BN watch samples, of so many
_USUAL_ASPECT = 1.5  # of photos whose long side is not known yet
_USUAL_PIXELS = 500_000  # of photos that are kept as they are


def preprocessing_of(recipe: Recipe) -> Preprocessing:
    """What evaluation sees."""
    return Preprocessing(
        size=recipe.size,
        resize=recipe.resize,
        crop_fraction=recipe.crop_fraction,
        mean=recipe.mean,
        std=recipe.std,
        flip_tta=recipe.flip_tta,
    )


@dataclass(frozen=True, kw_only=True)
class Caches:
    """One for each way in which photos are looked at."""

    train: Cache
    """of photos as training crops from them"""
    sample: Cache
    """of training photos as inference sees them, to measure statistics on"""
    val: Cache


def make_caches(run: Run, recipe: Recipe, dataset: Dataset) -> Caches:
    """Caches that together take what the recipe allows."""
    limit = int(recipe.cache_gigabytes * 2**30)
    memory = limit or int(0.4 * free_memory())
    disk = limit or shutil.disk_usage(run.folder).free // 2
    train, val = len(dataset.in_split("train")), len(dataset.in_split("val"))
    sample = min(recipe.recalibration_images, train)
    mode, side, preprocessing = recipe.cache, shrunk_side(recipe), recipe.size**2 * 3
    if mode == "none":
        memory = 0
    of_val = min(memory, val * preprocessing)
    of_sample = min(memory - of_val, sample * preprocessing)
    memory -= of_val + of_sample
    if limit:
        disk -= of_val + of_sample
    estimate = int(side * side * 3 * _USUAL_ASPECT) if side else _USUAL_PIXELS * 3
    return Caches(
        train=choose_cache(mode, train, memory=memory, disk=disk, estimate=estimate, folder=run.folder),
        sample=Cache(sample, of_sample),
        val=Cache(val, of_val),
    )


def shrunk_side(recipe: Recipe) -> int:
    """The short side of the photos that training crops from; 0 is their own."""
    return round(recipe.pre_resize * recipe.size)


def make_context(
    recipe: Recipe, network: TableNetwork, dataset: Dataset, device: str, cache: Cache | None = None
) -> TrainingContext:
    """A network, on its device, with all that training it takes."""
    return TrainingContext(
        network=network,
        optimizer=make_optimizer(network, recipe),
        ema=EMA(network, recipe.ema) if recipe.ema else None,
        loader=TrainingLoader(
            dataset.in_split("train"),
            dataset.classes,
            short_side=shrunk_side(recipe),
            area=recipe.crop_area,
            aspect=recipe.crop_aspect,
            flip=recipe.flip,
            color_jitter=recipe.color_jitter,
            shuffle=recipe.shuffle,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            workers=recipe.workers,
            cache=cache,
        ),
        recipe=recipe,
        preprocessing=preprocessing_of(recipe),
        device=device,
        forward=_forward(network, recipe),
    )


def make_bn_monitor(context: TrainingContext) -> BNMonitor:
    """The watch on a network's normalisation, or on nothing; an epoch has at least one window, if it is as long."""
    every = max(_WINDOW, min(_EVERY, context.loader.batches))
    return BNMonitor(context.network if context.recipe.bn_monitor else nn.Identity(), window=_WINDOW, every=every)


def scratch_copy(context: TrainingContext) -> TrainingContext:
    """A copy that trains as the trainee does, but does not learn, to try things on."""
    network = copy.deepcopy(context.network).train()
    optimizer = make_optimizer(network, context.recipe)
    set_learning_rate(optimizer, 0.0)  # answers learnt at a high rate could end in numbers that are none
    ema = EMA(network, context.ema.decay) if context.ema else None
    return replace(context, network=network, optimizer=optimizer, ema=ema, forward=_forward(network, context.recipe))


def _forward(network: TableNetwork, recipe: Recipe) -> Callable[[Tensor], Tensor | tuple[Tensor, ...]]:
    return torch.compile(network) if recipe.compile else network
