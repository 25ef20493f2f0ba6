"""Batch normalisation without the noise of the batch: batch renormalisation without clipping."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bnlab.norm import kernels, moments
from bnlab.norm.kernels import Running
from bnlab.norm.layers import BatchNorm


class Renormalisation(BatchNorm):
    """Batch renormalisation without clipping, which has the batch's gradients without the batch's noise.

    y = ((x - E[x]) / sqrt(Var[x] + eps) * r + d) * gamma + beta    (Ioffe 2017, arXiv 1702.03275, Alg. 1)

    with r = sqrt(Var[x] + eps) / sqrt(var + eps) and d = (E[x] - mean) / sqrt(var + eps), both without gradient, for
    the batch's E and Var (biased) and the running mean and var (unbiased). So the value of y is that of
    (x - mean) / sqrt(var + eps) * gamma + beta, but its gradient treats E and Var as functions of x.

    The running statistics are the average of the batches before this one: a moving average in which the new batch has
    the weight `momentum`, or 1 / n as the n-th batch if that is more, so that at first it is their plain average. The
    first batch is normalised by its own statistics. N x C x ... in and out.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected N x C x ..., got a {input.ndim}D input")

    def _transform(self, input: Tensor, running: Running | None, *, relu: bool) -> tuple[Tensor, bool | Tensor]:
        batches = 0 if self.num_batches_tracked is None else int(self.num_batches_tracked)
        if running is None:
            return super()._transform(input, running, relu=relu)
        found = moments.measure(input.detach())
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if batches:
            scale = torch.sqrt(running.var + self.eps)  # C
            mean, var = found.mean.to(scale), found.variance(unbiased=False).to(scale)  # C, C
            r, d = torch.sqrt(var + self.eps) / scale, (mean - running.mean) / scale  # C, C
            weight, bias = weight * r, bias + weight * d
        y = kernels.by_batch(input, weight, bias, None, self.eps).y  # N x C x ...
        moved = kernels.update_running(running._replace(momentum=max(running.momentum, 1 / (1 + batches))), found)
        return F.relu(y, inplace=True) if relu else y, moved
