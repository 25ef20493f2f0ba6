"""What a probe may do to a network within a training: it is restored afterwards, and a step can be replayed.

The photos of a batch and what dropout drops follow from the seed and the step alone. So the loss and the gradients of a
step can be computed again, at the same weights or at others.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnlab.nets.network import TableNetwork
from bnlab.norm.layers import StatisticsMode
from bnlab.training.build import TrainingContext
from bnlab.training.loop import loss_of, seed_step, training_batch
from bnlab.training.mixup import Targets
from bnlab.training.schedule import Plan


@contextmanager
def preserving_state(network: TableNetwork) -> Iterator[None]:
    """Restore the network's weights, statistics, modes and flags afterwards, whatever was done to them."""
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    training = {module: module.training for module in network.modules()}
    statistics = {layer: layer.statistics for layer in network.modules() if isinstance(layer, StatisticsMode)}
    try:
        yield
    finally:
        for layer, mode in statistics.items():
            layer.statistics = mode
        with torch.no_grad():
            network.load_state_dict(before)
        for module, flag in training.items():
            module.training = flag


def use_batch_statistics(network: TableNetwork) -> None:
    """Have the network normalise by batch statistics in evaluation too, without updating its running statistics."""
    for layer in network.modules():
        if isinstance(layer, StatisticsMode):
            layer.statistics = "batch"


@contextmanager
def replaying(context: TrainingContext) -> Iterator[None]:
    """Set the network to training mode. Afterwards restore it, and torch's generators."""
    devices = [torch.cuda.current_device()] if context.device == "cuda" else []
    with torch.random.fork_rng(devices=devices), preserving_state(context.network):
        context.network.train()
        yield


class Batch(NamedTuple):
    images: Tensor  # N x 3 x H x W
    targets: Targets


def batch_at(step: int, context: TrainingContext) -> Batch:
    """The batch that the loop trains on in this step, counted from 0."""
    recipe, loader = context.recipe, context.loader
    epoch, number = divmod(step, loader.batches)
    size = Plan.of(recipe, loader.batches).size(recipe, epoch)
    pixels, labels = next(iter(loader.epoch(epoch, size, number)))
    return Batch(*training_batch(context, pixels, labels, step))


def loss_and_gradients(
    context: TrainingContext, batch: Batch, parameters: Sequence[nn.Parameter], step: int
) -> tuple[float, list[Tensor]]:
    """The loss of a batch at the present weights and its gradients, with the random numbers of this step."""
    seed_step(context.recipe, step)
    loss = loss_of(context.network(batch.images), batch.targets, context.recipe)
    return loss.item(), list(torch.autograd.grad(loss, parameters))


def is_probe_step(step: int, context: TrainingContext, probe_steps: int) -> bool:
    """Whether a step is one of `probe_steps` that are spread evenly over a training.

    The first is not step 0, where a one-cycle schedule has not begun to learn.
    """
    steps = Plan.of(context.recipe, context.loader.batches).steps
    every = max(1, steps // probe_steps)
    return step % every == every // 2


def set_parameters(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Set the parameters that `values` has a value for."""
    with torch.no_grad():
        for name in parameters.keys() & values.keys():
            parameters[name].copy_(values[name])
