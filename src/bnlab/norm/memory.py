"""Batch normalisation followed by ReLU, keeping one tensor for backward instead of two.

Plainly, backward needs the normalisation's input x and the rectified output y. But y is a cheap function of x and the
batch's statistics: it is computed again, to the same bits, when it is asked for. The statistics are not, so that the
running ones are moved once (recomputing the whole layer, as `torch.utils.checkpoint` does, moves them twice).

`batch_norm_relu` alone keeps no y for itself. The layer that reads y, the next convolution say, would keep it still;
within `save_memory()` it does not either.

Shapes: N examples, C channels, then any number of positions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnlab.norm import kernels
from bnlab.norm.kernels import Running


class _BatchNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, eps: float
    ) -> tuple[Tensor, bool | Tensor]:
        done = kernels.by_batch(x, weight, bias, running, eps)
        ctx.save_for_backward(done.x, weight, bias, done.mean, done.invstd)
        y = done.y.relu_()
        ctx.eps, ctx.version = eps, y._version
        return y, done.moved

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
        x, weight, _, mean, invstd = ctx.saved_tensors
        y = _y_again(ctx)
        if torch.is_grad_enabled():  # for a gradient of the gradient
            dy = torch.ops.aten.threshold_backward(dy, y, 0)
        else:
            dy = torch.ops.aten.threshold_backward.grad_input(dy, y, 0, grad_input=y)
        wanted = ctx.needs_input_grad[:3]
        gradients = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, None, None, mean, invstd, True, ctx.eps, wanted
        )
        return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), None, None


_NODE: Any = _BatchNormReLU._backward_cls


def batch_norm_relu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, eps: float
) -> tuple[Tensor, bool | Tensor]:
    """ReLU of the batch, normalised by its own statistics; and whether the running statistics were moved.

    In pure half precision (parameters too) the statistics are too coarse to compute y from again: two tensors are kept.
    """
    if not torch.is_grad_enabled() or (weight if weight is not None else x).dtype in (torch.float16, torch.bfloat16):
        done = kernels.by_batch(x, weight, bias, running, eps)
        return done.y.relu_(), done.moved
    y, moved = _BatchNormReLU.apply(x, weight, bias, running, eps)  # type: ignore[no-untyped-call]
    return y, moved


@contextmanager
def save_memory() -> Iterator[None]:
    """Run a network's forward within it, and no layer keeps a rectified output for backward: it is computed again.

    Outputs and gradients are the same to the bit; forward and backward take one more reading of each such tensor.

        with norm.save_memory():
            loss = criterion(network(images), labels)
        loss.backward()
    """
    with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        yield


class _Kept(NamedTuple):
    tensor: Tensor
    version: int


class _Recipe(NamedTuple):
    node: Any
    """what computed the tensor: its autograd node, which keeps x and the statistics"""


def _pack(tensor: Tensor) -> _Kept | _Recipe:
    node: Any = tensor.grad_fn
    if isinstance(node, _NODE) and tensor._version == node.version:
        return _Recipe(node)
    return _Kept(tensor, tensor._version)


def _unpack(kept: _Kept | _Recipe) -> Tensor:
    if isinstance(kept, _Recipe):
        return _y_again(kept.node)
    if kept.tensor._version != kept.version:  # with hooks in place autograd does not look itself
        raise RuntimeError(
            f"a tensor of shape {list(kept.tensor.shape)} that backward needs was changed in place after it was kept: "
            "do it out of place, or outside of save_memory()"
        )
    return kept.tensor


def _y_again(ctx: Any) -> Tensor:
    x, weight, bias, mean, invstd = ctx.saved_tensors
    with torch.no_grad():
        return kernels.again(x, weight, bias, mean, invstd).relu_()
