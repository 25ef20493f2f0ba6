"""What a training is made of, as the recipe has it: the photos' caches, the loader, the optimiser, the average."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bnlab.data.cache import Cache, choose_cache
from bnlab.data.loader import TrainingLoader
from bnlab.data.pixels import View
from bnlab.data.source import Source
from bnlab.machine import free_memory
from bnlab.nets.network import TableNetwork
from bnlab.recipe import Recipe
from bnlab.runs import Run
from bnlab.training.average import Average
from bnlab.training.loop import Trainee
from bnlab.training.optimizer import make_optimizer, set_learning_rate
from bnlab.training.watch import Watch

_WINDOW, _EVERY = 8, 64  # steps that the BN watch samples, of so many
_USUAL_ASPECT = 1.5  # of photos whose long side is not known yet
_USUAL_PIXELS = 500_000  # of photos that are kept as they are


def view_of(recipe: Recipe) -> View:
    """What evaluation sees."""
    return View(
        size=recipe.size,
        resize=recipe.resize,
        crop_fraction=recipe.crop_fraction,
        mean=recipe.mean,
        std=recipe.std,
        mirror=recipe.mirror,
    )


@dataclass(frozen=True, kw_only=True)
class Caches:
    """One for each way in which photos are looked at."""

    train: Cache
    """of photos as training crops from them"""
    sample: Cache
    """of training photos as inference sees them, to measure statistics on"""
    val: Cache


def make_caches(run: Run, recipe: Recipe, source: Source) -> Caches:
    """Caches that together take what the recipe allows."""
    limit = int(recipe.cache_gigabytes * 2**30)
    memory = limit or int(0.4 * free_memory())
    disk = limit or shutil.disk_usage(run.folder).free // 2
    train, val = len(source.side("train")), len(source.side("val"))
    sample = min(recipe.recalibrate, train)
    mode, side, view = recipe.cache, shrunk_side(recipe), recipe.size**2 * 3
    if mode == "none":
        memory = 0
    of_val = min(memory, val * view)
    of_sample = min(memory - of_val, sample * view)
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
    return round(recipe.shrink * recipe.size)


def make_trainee(
    recipe: Recipe, network: TableNetwork, source: Source, device: str, cache: Cache | None = None
) -> Trainee:
    """A network, on its device, with all that training it takes."""
    return Trainee(
        network=network,
        optimizer=make_optimizer(network, recipe),
        average=Average(network, recipe.ema) if recipe.ema else None,
        loader=TrainingLoader(
            source.side("train"),
            source.classes,
            side=shrunk_side(recipe),
            area=recipe.crop_area,
            aspect=recipe.crop_aspect,
            flip=recipe.flip,
            photometric=recipe.photometric,
            shuffle=recipe.shuffle,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            workers=recipe.workers,
            cache=cache,
        ),
        recipe=recipe,
        view=view_of(recipe),
        device=device,
        forward=_forward(network, recipe),
    )


def make_watch(trainee: Trainee) -> Watch:
    """The watch on a network's normalisation, or on nothing; an epoch has at least one window, if it is as long."""
    every = max(_WINDOW, min(_EVERY, trainee.loader.batches))
    return Watch(trainee.network if trainee.recipe.watch else nn.Identity(), window=_WINDOW, every=every)


def throwaway(trainee: Trainee) -> Trainee:
    """A copy that trains as the trainee does, but does not learn, to try things on."""
    network = copy.deepcopy(trainee.network).train()
    optimizer = make_optimizer(network, trainee.recipe)
    set_learning_rate(optimizer, 0.0)  # answers learnt at a high rate could end in numbers that are none
    average = Average(network, trainee.average.decay) if trainee.average else None
    return replace(
        trainee, network=network, optimizer=optimizer, average=average, forward=_forward(network, trainee.recipe)
    )


def _forward(network: TableNetwork, recipe: Recipe) -> Callable[[Tensor], Tensor | tuple[Tensor, ...]]:
    return torch.compile(network) if recipe.compile else network
