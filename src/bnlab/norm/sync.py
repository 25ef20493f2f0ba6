"""Batch normalisation by the statistics of all processes' batches together, on any backend of torch.distributed.

nn.SyncBatchNorm refuses CPU tensors; this layer uses collectives that gloo has too. Batches may differ in size, and a
process that has no data left takes part with an empty batch (N = 0), so that the other processes do not wait for ever.
As with nn.SyncBatchNorm, the gradients of gamma and beta are the process's own, for DistributedDataParallel to average.

The processes exchange their counts, means and scatters, merged in float64 (see `moments.py`), and in backward two sums
for each channel: 3C + 1 numbers, however large the maps.

Shapes: N examples in this process, C channels, then any number of positions; M values a channel in all processes.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bnlab.norm import kernels, moments
from bnlab.norm.kernels import Running
from bnlab.norm.layers import BatchNorm, TooFewValuesError
from bnlab.norm.model_utils import layer_name
from bnlab.norm.moments import Moments

Group = dist.ProcessGroup | None


class SyncBatchNorm(BatchNorm):
    """Batch normalisation of N x C x ..., N over all processes; plain in inference and with one process.

    Parameters are those of `BatchNorm`, and `process_group`: the processes to synchronise with (default: all). All of
    them have to call the layer, and its backward, equally often.

    Raises:
        TooFewValuesError: all processes together have one value for each channel.
    """

    process_group: Group = None

    def __init__(self, num_features: int, *args: Any, process_group: Group = None, **more: Any) -> None:
        super().__init__(num_features, *args, **more)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2D input (got {input.ndim}D input)")

    def _synchronised(self) -> bool:
        distributed = self._in_training() and dist.is_available() and dist.is_initialized()
        return distributed and dist.get_world_size(self.process_group) > 1

    def _check_batch_size(self, input: Tensor) -> None:
        if not self._synchronised():
            super()._check_batch_size(input)

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
        everyone = _merge_processes(moments.measure(input), self.process_group) if self._synchronised() else None
        if everyone is None or not everyone.count:
            return super()._transform(input, weight, bias, running, eps, relu=relu)
        if everyone.count == 1:
            raise TooFewValuesError(
                f"Expected more than 1 value per channel when training, got 1 in all processes at "
                f"{layer_name(self)}: use batches of two or more, larger images, or freeze() the layer"
            )
        y = _SyncBatchNormFunction.apply(  # type: ignore[no-untyped-call]
            input, weight, bias, everyone, eps, self.process_group
        )  # N x C x ...
        updated = False if running is None else kernels.update_running(running, everyone)
        return F.relu(y, inplace=True) if relu else y, updated


class _SyncBatchNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, everyone: Moments, eps: float, group: Group
    ) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32) if weight is None else weight.dtype
        mean, var = everyone.mean.to(dtype), everyone.variance(unbiased=False).to(dtype)  # C, C
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.eps, ctx.group, ctx.count = eps, group, everyone.count
        return kernels.by_statistics(x, mean, var, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd = ctx.saved_tensors
        dgamma, dbeta = torch.zeros_like(mean), torch.zeros_like(mean)  # C: sums of dy x_hat and dy
        if x.numel():
            like = torch.ones_like(mean)
            _, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
                dy, x, like, None, None, mean, invstd, True, ctx.eps, (False, True, True)
            )
        sums = torch.cat([dgamma, dbeta])  # 2C
        dist.all_reduce(sums, group=ctx.group)
        sum_dy_x_hat, sum_dy = (sums / ctx.count).chunk(2)
        scale = invstd if weight is None else invstd * weight
        shape = (-1, *[1] * (x.ndim - 2))
        centred = x - mean.view(shape).to(x.dtype)
        # scale * (dy - sum_dy - x_hat * sum_dy_x_hat), the sums divided by M (paper, sec. 3)
        dx = (dy - sum_dy.view(shape)).addcmul_(centred, (-invstd * sum_dy_x_hat).view(shape)).mul_(scale.view(shape))
        _, wants_dgamma, wants_dbeta, *_ = ctx.needs_input_grad
        return dx.to(x.dtype), dgamma if wants_dgamma else None, dbeta if wants_dbeta else None, None, None, None


def _merge_processes(own: Moments, group: Group) -> Moments:
    """Return the moments of all processes' values, the same to the bit in each process."""
    mine = torch.cat([own.mean.new_tensor([own.count]), own.mean, own.scatter])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    channels = own.mean.numel()
    return moments.merge(Moments(int(part[0]), part[1 : channels + 1], part[channels + 1 :]) for part in everyone)
