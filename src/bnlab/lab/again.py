"""A step's batch once more: its loss and gradients at other weights, with the training left as it was.

What a batch holds and what dropout drops follow from the seed and the step alone, so a witness can see a step again.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnlab.data.pixels import normalise
from bnlab.lab.course import restored
from bnlab.training.loop import Trainee, to_device, total_loss
from bnlab.training.mixing import Targets, mixed
from bnlab.training.schedule import Plan


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one step trains on."""

    images: Tensor
    """N x 3 x H x W"""
    targets: Targets


def batch_of(step: int, trainee: Trainee) -> Batch:
    """The batch of a step, counted from 0, as the loop has it."""
    recipe, loader = trainee.recipe, trainee.loader
    epoch, number = divmod(step, loader.batches)
    size = Plan.of(recipe, loader.batches).size(recipe, epoch)
    pixels, labels = next(iter(loader.epoch(epoch, size, number)))
    images = normalise(to_device(pixels, trainee.device), trainee.view)  # N x 3 x H x W
    images, targets = mixed(images, to_device(labels, trainee.device), recipe, step)
    return Batch(images=images, targets=targets)


@contextmanager
def aside(trainee: Trainee) -> Iterator[None]:
    """The network in training mode; its weights, statistics, flags and torch's generators are put back afterwards."""
    devices = [torch.cuda.current_device()] if trainee.device == "cuda" else []
    with torch.random.fork_rng(devices=devices), restored(trainee.network):
        trainee.network.train()
        yield


def gradients(
    trainee: Trainee, batch: Batch, parameters: Sequence[nn.Parameter], step: int
) -> tuple[float, list[Tensor]]:
    """The loss of a batch at the present weights, and its gradients; random layers do as in that step."""
    torch.manual_seed(trainee.recipe.seed * 1_000_003 + step)
    loss = total_loss(trainee.network(batch.images), batch.targets, trainee.recipe)
    return loss.item(), list(torch.autograd.grad(loss, parameters))


def is_look(step: int, trainee: Trainee, looks: int) -> bool:
    """Whether it is time for one of so many looks in a training, evenly spread, the first not at step 0,
    where a one-cycle has not begun to learn."""
    steps = Plan.of(trainee.recipe, trainee.loader.batches).steps
    every = max(1, steps // looks)
    return step % every == every // 2


def put(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Give parameters the values that are there for them."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name in values:
                parameter.copy_(values[name])
