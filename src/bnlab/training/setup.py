"""What every training begins with: its photos, its network, and the errors it may meet."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bnlab.config import Settings, with_changes
from bnlab.data.listing import tell_missing
from bnlab.data.pixels import normalise
from bnlab.data.scan import tell_refused
from bnlab.data.source import Source, open_training_data
from bnlab.errors import UsageError
from bnlab.machine import choose_device, fast_precision, memory_errors
from bnlab.nets import fit_to_data
from bnlab.nets.freeze import Frozen
from bnlab.nets.network import TableNetwork
from bnlab.progress import Progress
from bnlab.training.fitting import what_fits
from bnlab.training.loop import Trainee
from bnlab.training.start import adopt, check_network, load_into, new_network
from bnlab.training.tell import tell_without_effect


@dataclass(frozen=True, kw_only=True)
class SetUp:
    """A training that could begin: nothing is written yet."""

    settings: Settings
    """with what was taken from the file in `init`"""
    device: str
    source: Source
    network: TableNetwork
    """on the CPU, with its first weights"""
    frozen: Frozen


def set_up(data: Path, settings: Settings, *, strict: bool, progress: Progress) -> SetUp:
    """Open DATA and build the network; say what has no effect.

    Raises:
        BnlabError: DATA or the recipe cannot be used.
    """
    settings = adopt(settings)
    device = choose_device(settings.recipe.device)
    if settings.recipe.precision == "auto":
        settings = with_changes(settings, {"precision": fast_precision(device)}, "machine")
    recipe = settings.recipe
    check_network(recipe)
    source = open_training_data(data, val=recipe.val, seed=recipe.seed, progress=progress)
    tell_refused(source.refused, strict=strict, progress=progress)
    tell_missing(source.photos, "val", progress)
    network, frozen = new_network(recipe, classes=len(source.classes))
    tell_without_effect(settings, source, network, progress)
    if recipe.init is not None:
        load_into(network, source.classes, recipe.init, progress)
    return SetUp(settings=settings, device=device, source=source, network=network, frozen=frozen)


def fit_first_batch(trainee: Trainee) -> None:
    """Scale the new network on the first batch, where the recipe says so."""
    recipe = trainee.recipe
    if recipe.data_dependent and recipe.init is None:
        pixels, _ = next(trainee.loader.epoch(0, recipe.size))
        fit_to_data(trainee.network, normalise(torch.from_numpy(pixels).to(trainee.device), trainee.view))
        if trainee.average:
            trainee.average.begin(trainee.network)


@contextmanager
def exact(device: str) -> Iterator[None]:
    """The same steps give the same weights, and torch is left as it was: its generators and its choice of kernels."""
    cuda = [torch.cuda.current_device()] if device == "cuda" else []
    with (
        torch.random.fork_rng(devices=cuda),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True),
    ):
        yield


@contextmanager
def batch_errors(trainee: Trainee) -> Iterator[None]:
    """Say of a batch that does not fit, or that has nothing to normalise by, what would do."""
    recipe = trainee.recipe
    try:
        with memory_errors(recipe.batch_size, recipe.size, partial(what_fits, trainee)):
            yield
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):  # torch's words, and those of bnlab.norm
            raise
        raise UsageError(
            f"a part of a batch has nothing to normalise by ({str(error).splitlines()[0]})",
            "take a larger batch_size, size or ghost batch",
        ) from None
