"""Batch normalisation followed by ReLU that keeps one tensor for backward instead of two.

Without this, backward keeps the normalisation's input x and the rectified output y. But y is a cheap function of x and
the batch's statistics, so backward recomputes it, to the same bits. The statistics are not recomputed.

`batch_norm_relu` alone keeps no y for itself, but the layer that reads y, such as the next convolution, still does.
Within `save_memory()` that layer does not keep y either.

Shapes: N examples, C channels, then any number of positions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from operator import methodcaller
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from bnlab.norm import kernels
from bnlab.norm.kernels import Running


class _BatchNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, eps: float
    ) -> tuple[Tensor, bool | Tensor]:
        normalised = kernels.by_batch(x, weight, bias, running, eps)
        ctx.save_for_backward(x, weight, bias, normalised.mean, normalised.invstd, normalised.shift)
        y = normalised.y.relu_()
        ctx.eps, ctx.version = eps, y._version
        ctx.shadow = y.detach()  # has y's version counter, which shows a change of y in place, but not y's memory
        ctx.shadow.data = y.new_empty(0)
        ctx.y = None  # set by the last reader of the recomputed y, for the backward that follows it
        return y, normalised.updated

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # within torch.utils.checkpoint they can be read only once
        x, weight, _, mean, invstd, shift = saved
        y, ctx.y = ctx.y, None
        x, y = kernels.shifted(x, shift), _recompute_y(*saved) if y is None else y
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
    """Normalise a batch by its own statistics and apply ReLU; return y and whether the running statistics moved.

    Two tensors are kept where recomputing is not possible or not ours to decide: in pure half precision (parameters
    too), where the statistics are too coarse to recompute y from them, when compiling, and under torch.func. Of an
    empty batch there is nothing to keep.
    """
    coarse = (weight if weight is not None else x).dtype in (torch.float16, torch.bfloat16)
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if coarse or transformed or not x.numel() or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        normalised = kernels.by_batch(x, weight, bias, running, eps)
        return normalised.y.relu_(), normalised.updated
    y, updated = _BatchNormReLU.apply(x, weight, bias, running, eps)  # type: ignore[no-untyped-call]
    return y, updated


@contextmanager
def save_memory() -> Iterator[None]:
    """Within this context, no layer keeps the output of BN and ReLU for backward, which recomputes it.

    The same holds for a concatenation of such outputs, as in an Inception block. It costs one more reading of each such
    tensor. Outputs and gradients are the same to the bit (on a GPU up to rounding), provided that nothing is changed
    through `.data`, which autograd does not notice, before backward.

        with norm.save_memory():
            loss = criterion(network(images), labels)
        loss.backward()
    """
    recomputations: WeakValueDictionary[Any, _Recomputation] = WeakValueDictionary()  # autograd owns them

    def pack(tensor: Tensor) -> _Saved | _Recomputation:
        node: Any = tensor.grad_fn
        if not _is_cheap(node) or tensor._version != getattr(node, "version", 0):
            return _Saved(tensor.detach(), tensor._version)  # without its graph, which refers to what is saved here
        recomputation = recomputations.setdefault(node, _Recomputation(node))
        recomputation.readers += 1
        return recomputation

    with torch.autograd.graph.saved_tensors_hooks(pack, methodcaller("read")):
        try:
            yield
        finally:  # autograd's tensors refer to `pack`, which would otherwise refer to them
            recomputations.clear()


class _Recomputation:
    """Recomputes the output of an autograd node, and keeps it until all its readers have read it."""

    def __init__(self, node: Any) -> None:
        self.node = node
        self.readers = self.remaining = 0
        self.tensor: Tensor | None = None

    def read(self) -> Tensor:
        if self.tensor is None:
            self.tensor, self.remaining = _recompute(self.node), self.readers
        tensor, self.remaining = self.tensor, self.remaining - 1
        if not self.remaining:
            self.tensor = None
            if isinstance(self.node, _NODE):
                self.node.y = tensor
        return tensor


class _Saved(NamedTuple):
    """A tensor that backward cannot recompute, and its version when it was saved."""

    tensor: Tensor
    version: int

    def read(self) -> Tensor:
        if self.tensor._version != self.version:  # autograd itself does not check where hooks are set
            raise RuntimeError(
                f"a tensor of shape {list(self.tensor.shape)} that backward needs was changed in place after it was "
                "saved: change it out of place, or outside of save_memory()"
            )
        return self.tensor


def _is_cheap(node: Any) -> bool:
    """Whether the node is BN and ReLU, or a concatenation of their outputs, none changed in place since."""
    nodes = [n for n, _ in node.next_functions] if node is not None and node.name() == "CatBackward0" else [node]
    return all(isinstance(n, _NODE) and n.shadow._version == n.version for n in nodes)


def _recompute(node: Any) -> Tensor:
    if isinstance(node, _NODE):
        return _recompute_y(*node.saved_tensors)
    dim = node._saved_dim  # as unsigned: a negative one is 2^64 too large
    return torch.cat([_recompute(n) for n, _ in node.next_functions], dim - 2**64 if dim >= 2**63 else dim)


def _recompute_y(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, shift: Tensor | None
) -> Tensor:
    with torch.no_grad():
        return kernels.recompute(kernels.shifted(x, shift), weight, bias, mean, invstd).relu_()
