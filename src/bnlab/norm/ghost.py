"""Ghost batch normalisation: each part of a batch is normalised by itself, as if it were a smaller batch.

The statistics of a large batch lack most of the noise that regularises small batches. Normalising its parts restores
that noise: Hoffer, Hubara & Soudry 2017, "Train longer, generalize better", arXiv 1705.08741, Alg. 1.

The running statistics are updated once for each batch, by the statistics of all of it (Hoffer et al. update them with
each part in turn), because inference needs those of the population, and the parts are not better samples of it.

Shapes: N examples, C channels, then any number of positions.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab.norm import kernels, moments
from bnlab.norm.kernels import Running
from bnlab.norm.layers import BatchNorm, TooFewValuesError
from bnlab.norm.model_utils import layer_name


class GhostBatchNorm(BatchNorm):
    """Base of the layers for each number of dimensions.

    Parameters are those of `BatchNorm`, and `ghost_size`: the largest number of examples that are normalised together.
    N examples make ceil(N / ghost_size) parts, whose sizes differ by one at most.

    Raises:
        ValueError: ghost_size is below 1.
        TooFewValuesError: in training, a part has one value for each channel.
    """

    def __init__(self, num_features: int, *args: Any, ghost_size: int = 32, **more: Any) -> None:
        super().__init__(num_features, *args, **more)
        if ghost_size < 1:
            raise ValueError(f"ghost_size is the number of examples normalised together, at least 1, not {ghost_size}")
        self.ghost_size = ghost_size

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ghost_size={self.ghost_size}"

    def _transform(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: Running | None,
        eps: float,
        *,
        relu: bool,
    ) -> tuple[Tensor, bool | Tensor]:
        parts = -(-len(input) // self.ghost_size)
        if parts == 1 or not input.numel():
            return super()._transform(input, weight, bias, running, eps, relu=relu)
        size, larger = divmod(len(input), parts)
        # Not tensor_split, whose backward makes a tensor of the whole batch for each part, and loses channels_last
        ghosts = torch.split(input, [size + 1] * larger + [size] * (parts - larger))
        if ghosts[-1].numel() == self.num_features:
            raise TooFewValuesError(
                f"Expected more than 1 value per channel when training, got parts of size {ghosts[-1].size()} at "
                f"{layer_name(self)}: use a larger ghost_size"
            )
        normalised = [kernels.by_batch(ghost, weight, bias, None, eps).y for ghost in ghosts]
        y = torch.cat(normalised)  # N x C x ...
        updated = False if running is None else kernels.update_running(running, moments.measure(input))
        return F.relu(y, inplace=True) if relu else y, updated


class GhostBatchNorm1d(GhostBatchNorm, nn.BatchNorm1d):
    """Ghost batch normalisation of N x C, or N x C x L."""


class GhostBatchNorm2d(GhostBatchNorm, nn.BatchNorm2d):
    """Ghost batch normalisation of N x C x H x W."""
