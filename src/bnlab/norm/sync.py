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
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.norm import kernels, moments
from bnlab.norm.ghost import GhostBatchNorm
from bnlab.norm.kernels import Running
from bnlab.norm.layers import BatchNorm, TooFewValuesError, batch_norm_layers, is_plain
from bnlab.norm.model_utils import layer_name
from bnlab.norm.moments import Moments

Group = dist.ProcessGroup | None


class SyncBatchNorm(BatchNorm):
    """Batch normalisation of N x C x ..., N over all processes; plain in inference and with one process.

    Parameters are those of `BatchNorm`, and `process_group`: the processes to synchronise with (default: all). All of
    them have to call the layer, and its backward, equally often.

    Raises:
        TooFewValuesError: all processes together have one value for each channel, or none.
    """

    process_group: Group = None
    _converted_from: type[_BatchNorm] | None = None  # by `convert_sync`

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

    def _transform(self, input: Tensor, running: Running | None, *, relu: bool) -> tuple[Tensor, bool | Tensor]:
        if not self._synchronised():
            return super()._transform(input, running, relu=relu)
        everyone = _merge_processes(moments.measure(input), self.process_group)
        if everyone.count < 2:
            raise TooFewValuesError(
                f"Expected more than 1 value per channel when training, got {everyone.count} in all processes at "
                f"{layer_name(self)}: use batches of two or more, larger images, or freeze() the layer"
            )
        y = _SyncBatchNormFunction.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, everyone, self.eps, self.process_group
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


def convert_sync(model: nn.Module, process_group: Group = None) -> nn.Module:
    """Turn every BatchNorm1d, 2d, 3d and SyncBatchNorm of the model, torch.nn's and bnlab's, into a `SyncBatchNorm`.

    The model is changed in place: layers, parameters, buffers and hooks remain the same objects, so that an optimiser
    still holds them. Ghost batch normalisation and subclasses that override forward are not converted. Convert
    before wrapping the model in DistributedDataParallel. Returns the model.
    """
    for _, layer in batch_norm_layers(model):
        if isinstance(layer, SyncBatchNorm):
            layer.process_group = process_group or layer.process_group
        elif is_plain(layer) and not isinstance(layer, GhostBatchNorm):
            group = process_group or getattr(layer, "process_group", None)
            mode = layer._requested_mode if isinstance(layer, BatchNorm) else layer.training
            kind, layer.__class__ = type(layer), SyncBatchNorm
            vars(layer).update(_converted_from=kind, process_group=group, _requested_mode=mode)
    return model


def revert_sync(model: nn.Module) -> nn.Module:
    """Undo `convert_sync`. A layer that was constructed as a SyncBatchNorm, rather than converted, stays one.

    Raises:
        ValueError: a converted layer of torch.nn's was frozen meanwhile, which torch.nn's layers do not support.
    """
    for _, layer in batch_norm_layers(model):
        if isinstance(layer, SyncBatchNorm) and layer._converted_from is not None:
            if layer.frozen and not issubclass(layer._converted_from, BatchNorm):
                raise ValueError(
                    f"a frozen layer cannot become {layer._converted_from.__name__} again: unfreeze() it first"
                )
            layer.__class__ = layer._converted_from  # type: ignore[assignment]
    return model


def _merge_processes(own: Moments, group: Group) -> Moments:
    """Return the moments of all processes' values, the same to the bit in each process."""
    mine = torch.cat([own.mean.new_tensor([own.count]), own.mean, own.scatter])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    channels = own.mean.numel()
    return moments.merge(Moments(int(part[0]), part[1 : channels + 1], part[channels + 1 :]) for part in everyone)
