"""A step's batch once more: its loss and gradients at other weights, with the training left as it was.

What a batch holds and what dropout drops follow from the seed and the step alone, so a witness can see a step again.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnlab.lab.trained_network import preserving_state
from bnlab.training.build import TrainingContext
from bnlab.training.loop import loss_of, seed_step, training_batch
from bnlab.training.mixup import Targets
from bnlab.training.schedule import Plan


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one step trains on."""

    images: Tensor
    """N x 3 x H x W"""
    targets: Targets


def batch_at(step: int, context: TrainingContext) -> Batch:
    """The batch of a step, counted from 0, as the loop has it."""
    recipe, loader = context.recipe, context.loader
    epoch, number = divmod(step, loader.batches)
    size = Plan.of(recipe, loader.batches).size(recipe, epoch)
    pixels, labels = next(iter(loader.epoch(epoch, size, number)))
    images, targets = training_batch(context, pixels, labels, step)
    return Batch(images=images, targets=targets)


@contextmanager
def replaying(context: TrainingContext) -> Iterator[None]:
    """The network in training mode; its weights, statistics, flags and torch's generators are put back afterwards."""
    devices = [torch.cuda.current_device()] if context.device == "cuda" else []
    with torch.random.fork_rng(devices=devices), preserving_state(context.network):
        context.network.train()
        yield


def loss_and_gradients(
    context: TrainingContext, batch: Batch, parameters: Sequence[nn.Parameter], step: int
) -> tuple[float, list[Tensor]]:
    """The loss of a batch at the present weights, and its gradients; random layers do as in that step."""
    seed_step(context.recipe, step)
    loss = loss_of(context.network(batch.images), batch.targets, context.recipe)
    return loss.item(), list(torch.autograd.grad(loss, parameters))


def is_probe_step(step: int, context: TrainingContext, probe_steps: int) -> bool:
    """Whether it is time for one of so many looks in a training, evenly spread, the first not at step 0,
    where a one-cycle has not begun to learn."""
    steps = Plan.of(context.recipe, context.loader.batches).steps
    every = max(1, steps // probe_steps)
    return step % every == every // 2


def set_parameters(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Give parameters the values that are there for them."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name in values:
                parameter.copy_(values[name])
