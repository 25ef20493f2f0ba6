"""An exponential moving average of the weights (Polyak & Juditsky 1992), validated and kept in their place."""

from typing import cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from bnlab.nets.network import TableNetwork

_EVERY = 4  # steps between updates: the average is as good as with an update a step, at a quarter of the cost

Tensors = tuple[Tensor, ...] | list[Tensor]


class EMA:
    """Averages weights and running statistics with torch's AveragedModel: average = k * average + (1 - k) * new.

    After n steps each step has k = min(decay, n / (n + 10)), as in TensorFlow's ExponentialMovingAverage with
    num_updates, so that a young average soon forgets the initial weights. torch's own `get_ema_multi_avg_fn` has no
    such warm-up, and would also average integers: counters of batches are copied here.
    """

    def __init__(self, network: TableNetwork, decay: float) -> None:
        self.decay, self._step = decay, 0
        self.model = AveragedModel(network, multi_avg_fn=self._average, use_buffers=True).requires_grad_(False)
        self.restart(network)

    @property
    def network(self) -> TableNetwork:
        return cast(TableNetwork, self.model.module)

    def restart(self, network: TableNetwork) -> None:
        self.model.n_averaged.zero_()
        self.model.update_parameters(network)  # its first update copies

    def update(self, network: TableNetwork, step: int) -> None:
        """Add the weights after step `step`, counted from 1, to the average; only every fourth step has an effect."""
        if step % _EVERY == 0:
            self._step = step
            self.model.update_parameters(network)

    def _average(self, averages: Tensors, values: Tensors, _: object) -> None:
        if averages[0].is_floating_point():
            keep = min(self.decay, self._step / (self._step + 10)) ** _EVERY
            torch._foreach_lerp_(averages, values, 1 - keep)
        else:
            torch._foreach_copy_(averages, values)
