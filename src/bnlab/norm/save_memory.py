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
        done = kernels.by_batch(x, weight, bias, running, eps)
        ctx.save_for_backward(x, weight, bias, done.mean, done.invstd, done.shift)
        y = done.y.relu_()
        ctx.eps, ctx.version = eps, y._version
        ctx.shadow = y.detach()  # without y's memory, it has y's version still: whether y was changed in place
        ctx.shadow.data = y.new_empty(0)
        ctx.y = None  # what the last of its readers leaves of it for backward, which comes next
        return y, done.moved

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: within torch.utils.checkpoint they cannot be read again
        x, weight, _, mean, invstd, shift = saved
        y, ctx.y = ctx.y, None
        x, y = kernels.shifted(x, shift), _y_again(*saved) if y is None else y
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
    When compiling too, and under torch.func: what to keep and what to compute again is theirs to choose.
    """
    coarse = (weight if weight is not None else x).dtype in (torch.float16, torch.bfloat16)
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if coarse or transformed or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        done = kernels.by_batch(x, weight, bias, running, eps)
        return done.y.relu_(), done.moved
    y, moved = _BatchNormReLU.apply(x, weight, bias, running, eps)  # type: ignore[no-untyped-call]
    return y, moved


@contextmanager
def save_memory() -> Iterator[None]:
    """Run a network's forward within it, and no layer keeps a rectified output for backward: it is computed again.

    Nor does it keep several of them concatenated, as an Inception block gives them. It costs one more reading of each
    such tensor. Outputs and gradients are the same to the bit (on a GPU but for rounding), if nothing is changed
    behind autograd's back, through `.data`, before backward.

        with norm.save_memory():
            loss = criterion(network(images), labels)
        loss.backward()
    """
    saver = _Saver()
    with torch.autograd.graph.saved_tensors_hooks(saver.keep, saver.give):
        try:
            yield
        finally:  # what autograd keeps holds the saver, which would hold all that autograd keeps
            saver.recipes.clear()


class _Recipe:
    """How to compute a tensor again, from the autograd node that did; kept, once computed, until all have read it."""

    def __init__(self, node: Any) -> None:
        self.node = node
        self.readers = self.to_come = 0
        self.tensor: Tensor | None = None

    def read(self) -> Tensor:
        if self.tensor is None:
            self.tensor, self.to_come = _again(self.node), self.readers
        tensor, self.to_come = self.tensor, self.to_come - 1
        if not self.to_come:
            self.tensor = None
            if isinstance(self.node, _NODE):
                self.node.y = tensor
        return tensor


class _Kept(NamedTuple):
    tensor: Tensor
    version: int


class _Saver:
    """Keeps for backward what cannot be computed again, and recipes for what can."""

    def __init__(self) -> None:
        self.recipes: WeakValueDictionary[Any, _Recipe] = WeakValueDictionary()  # theirs who keep them

    def keep(self, tensor: Tensor) -> _Kept | _Recipe:
        node: Any = tensor.grad_fn
        if not _is_cheap(node) or tensor._version != getattr(node, "version", 0):
            return _Kept(tensor.detach(), tensor._version)  # itself, it would keep what computed it, which keeps this
        recipe = self.recipes.get(node) or _Recipe(node)
        self.recipes[node] = recipe
        recipe.readers += 1
        return recipe

    @staticmethod
    def give(kept: _Kept | _Recipe) -> Tensor:
        if isinstance(kept, _Recipe):
            return kept.read()
        if kept.tensor._version != kept.version:  # with hooks in place autograd does not look itself
            raise RuntimeError(
                f"a tensor of shape {list(kept.tensor.shape)} that backward needs was changed in place after it was "
                "kept: do it out of place, or outside of save_memory()"
            )
        return kept.tensor


def _is_cheap(node: Any) -> bool:
    """Whether it is BN and ReLU, or a concatenation of their outputs, none changed in place since."""
    nodes = [n for n, _ in node.next_functions] if node is not None and node.name() == "CatBackward0" else [node]
    return all(isinstance(n, _NODE) and n.shadow._version == n.version for n in nodes)


def _again(node: Any) -> Tensor:
    if isinstance(node, _NODE):
        return _y_again(*node.saved_tensors)
    dim = node._saved_dim  # negative ones wrapped around
    return torch.cat([_again(n) for n, _ in node.next_functions], dim - 2**64 if dim >= 2**63 else dim)


def _y_again(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, shift: Tensor | None
) -> Tensor:
    with torch.no_grad():
        return kernels.again(kernels.shifted(x, shift), weight, bias, mean, invstd).relu_()
