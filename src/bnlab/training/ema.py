"""A moving average of the weights (Polyak & Juditsky 1992), to be judged and kept in place of the last ones."""

import copy

import torch

from bnlab.nets.network import TableNetwork

_EVERY = 4  # steps from one update to the next: the average is as good, and a quarter of the cost


class EMA:
    """Keeps `decay` of itself at each step. Running statistics are averaged with the weights; counts are taken over.

    It begins at the first weights, and forgets them the quicker the younger it is: after n steps it keeps at most
    n / (n + 10) of itself at each (as TensorFlow's ExponentialMovingAverage with num_updates has it).
    """

    def __init__(self, network: TableNetwork, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).requires_grad_(False)

    def begin(self, network: TableNetwork) -> None:
        """Begin anew at the weights of a network."""
        self.network.load_state_dict(network.state_dict())

    @torch.no_grad()
    def update(self, network: TableNetwork, step: int) -> None:
        """Take in the weights after step `step`, counted from 1."""
        if step % _EVERY:
            return
        keep = min(self.decay, step / (step + 10)) ** _EVERY
        averages, values = list(self.network.state_dict().values()), list(network.state_dict().values())
        moving = [i for i, ema in enumerate(averages) if ema.is_floating_point()]
        torch._foreach_lerp_([averages[i] for i in moving], [values[i] for i in moving], 1 - keep)
        for i in set(range(len(averages))) - set(moving):
            averages[i].copy_(values[i])
