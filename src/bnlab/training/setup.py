"""What every training begins with: its photos, its network, and the errors it may meet."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bnlab.config import Settings, with_changes
from bnlab.data.dataset import Dataset, open_training_data
from bnlab.data.preprocess import normalise
from bnlab.data.scan import report_refused
from bnlab.data.split_csv import report_missing_classes
from bnlab.errors import UsageError
from bnlab.machine import choose_device, fast_precision, memory_errors
from bnlab.nets import lsuv_init
from bnlab.nets.freeze import Frozen
from bnlab.nets.network import TableNetwork
from bnlab.progress import Progress
from bnlab.training.finetune import check_network, inherit_from_init, load_pretrained, new_network
from bnlab.training.loop import TrainingContext
from bnlab.training.memory_advice import suggest_batch_size
from bnlab.training.messages import warn_without_effect


@dataclass(frozen=True, kw_only=True)
class SetUp:
    """A training that could begin: nothing is written yet."""

    settings: Settings
    """with what was taken from the file in `init`"""
    device: str
    dataset: Dataset
    network: TableNetwork
    """on the CPU, with its first weights"""
    frozen: Frozen


def set_up(data: Path, settings: Settings, *, strict: bool, progress: Progress) -> SetUp:
    """Open DATA and build the network; say what has no effect.

    Raises:
        BnlabError: DATA or the recipe cannot be used.
    """
    settings = inherit_from_init(settings)
    device = choose_device(settings.recipe.device)
    if settings.recipe.precision == "auto":
        settings = with_changes(settings, {"precision": fast_precision(device)}, "machine")
    recipe = settings.recipe
    check_network(recipe)
    dataset = open_training_data(data, val=recipe.val, seed=recipe.seed, progress=progress)
    report_refused(dataset.refused, strict=strict, progress=progress)
    report_missing_classes(dataset.photos, "val", progress)
    network, frozen = new_network(recipe, classes=len(dataset.classes))
    warn_without_effect(settings, dataset, network, progress)
    if recipe.init is not None:
        load_pretrained(network, dataset.classes, recipe.init, progress)
    return SetUp(settings=settings, device=device, dataset=dataset, network=network, frozen=frozen)


def init_on_first_batch(context: TrainingContext) -> None:
    """Scale the new network on the first batch, where the recipe says so."""
    recipe = context.recipe
    if recipe.lsuv_init and recipe.init is None:
        pixels, _ = next(context.loader.epoch(0, recipe.size))
        lsuv_init(context.network, normalise(torch.from_numpy(pixels).to(context.device), context.preprocessing))
        if context.ema:
            context.ema.begin(context.network)


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
def batch_errors(context: TrainingContext) -> Iterator[None]:
    """Say of a batch that does not fit, or that has nothing to normalise by, what would do."""
    recipe = context.recipe
    try:
        with memory_errors(recipe.batch_size, recipe.size, partial(suggest_batch_size, context)):
            yield
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):  # torch's words, and those of bnlab.norm
            raise
        raise UsageError(
            f"a part of a batch has nothing to normalise by ({str(error).splitlines()[0]})",
            "take a larger batch_size, size or ghost batch",
        ) from None
