"""The statistics that a network's layers keep, taken out, put in, measured and compared, for studies of them.

Shapes: C channels of all layers together; "2C" are all layers' means, then all their variances.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.errors import DivergedError
from bnlab.lab.trained_network import TrainedNetwork, preserving_state
from bnlab.nets.network import TableNetwork
from bnlab.norm.layers import batch_norm_layers


def read(network: TableNetwork) -> Tensor:
    """What its layers keep, 2C: all layers' means, then their variances."""
    layers = _layers(network)
    return torch.cat([layer.get_buffer(key) for key in ("running_mean", "running_var") for layer in layers]).clone()


def put(network: TableNetwork, values: Tensor) -> None:
    """Have its layers keep these, 2C."""
    layers, start = _layers(network), 0
    for key in ("running_mean", "running_var"):
        for layer in layers:
            layer.get_buffer(key).copy_(values[start : start + layer.num_features])
            start += layer.num_features


def population(trained: TrainedNetwork, images: int) -> Tensor:
    """The statistics of so many photos of train with the weights as they are, 2C; the network stays as it is."""
    with preserving_state(trained.context.network):
        trained.recalibrate(images)
        return read(trained.context.network)


def accuracy_by(values: Tensor, trained: TrainedNetwork) -> float:
    """The share of test that the network has right by these statistics, 2C; it stays as it is."""
    with preserving_state(trained.context.network), torch.no_grad():
        put(trained.context.network, values)
        return trained.evaluation("test", "running").top1


def or_guess(measured: Callable[[], float], guess: float) -> float:
    """An accuracy; where the network or its statistics are not finite, that of guessing."""
    try:
        return measured()
    except DivergedError:
        return guess


def distances(values: Tensor, whole: Tensor) -> tuple[float, float]:
    """How far statistics, 2C, are from others, as root mean squares over the channels.

    Of the means in standard deviations; of the variances as the logarithm of their ratio. Channels that do not vary,
    such as those of a dead unit, are left out.
    """
    (mean, variance), (true_mean, true_variance) = values.double().chunk(2), whole.double().chunk(2)  # C each
    live = (variance > 0) & (true_variance > 0)
    if not live.any():
        return 0.0, 0.0
    off = ((mean - true_mean)[live] / true_variance[live].sqrt()).square().mean().sqrt()
    ratio = (variance[live] / true_variance[live]).log().square().mean().sqrt()
    return float(off), float(ratio)


def _layers(network: TableNetwork) -> list[_BatchNorm]:
    return [layer for _, layer in batch_norm_layers(network) if layer.running_mean is not None]
